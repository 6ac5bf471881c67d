import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexicodec_hf import FlexiCodecVoice


CODES, LENGTHS = torch.tensor([3, 1, 2], dtype=torch.int32), torch.tensor([1, 8, 2], dtype=torch.int32)


def voice_file(path: Path, metadata: str = "{}", **changes: torch.Tensor | None) -> Path:
    tensors = {"audio_codes/0.91": CODES, "token_lengths/0.91": LENGTHS, "mel": torch.zeros(4, 2)}
    tensors = {name: tensor.clone() for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "flexicodec_voice", "voice": metadata})
    return path


def test_a_voice_file_is_read(tmp_path):
    voice = FlexiCodecVoice.load(voice_file(tmp_path / "a.safetensors"))
    assert voice.tokens_at(0.91)[1].tolist() == [1, 8, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_codes/0.91": CODES.float()}, "codes of the voice .* must be integers .* got torch.float32"),
        ({"token_lengths/0.91": LENGTHS.float()}, "token lengths of the voice .* got torch.float32"),
        ({"token_lengths/0.91": LENGTHS[:2].clone()}, "the same for codes and lengths"),
        ({"audio_codes/0.91": CODES[:0], "token_lengths/0.91": LENGTHS[:0]}, "no tokens at merging threshold 0.91"),
        ({"token_lengths/0.91": torch.tensor([1, 0, 2])}, "token lengths .* at least 1, got values from 0 to 2"),
        ({"audio_codes/0.91": torch.tensor([1, -1, 2])}, "codes .* at least 0, got values from -1 to 2"),
        ({"token_lengths/0.91": None}, "damaged voice .*token_lengths/0.91"),
        ({"audio_codes/high": CODES, "token_lengths/high": LENGTHS}, "damaged voice .*high"),
        ({"mel": torch.zeros(4)}, r"`mel` .* must be floats .* shape \(4,\)"),
        ({"mel": torch.full((4, 2), torch.nan)}, "`mel` .* NaN"),
        ({"text_ids": torch.zeros(3)}, "`text_ids` .* must be integers"),
        ({"metadata": "not JSON"}, "damaged voice"),
        ({"metadata": "[]"}, "`metadata` .* must be a dictionary"),
    ],
)
def test_damaged_voice_files_say_what_is_wrong(tmp_path, changes, message):
    path = voice_file(tmp_path / "a.safetensors", **changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        FlexiCodecVoice.load(path)


def test_a_voice_of_another_codec_is_refused():
    voice = FlexiCodecVoice({0.91: (CODES.long(), LENGTHS.long() + 1)})
    voice.check(max_frames_per_token=9)
    with pytest.raises(ValueError, match=r"token lengths .* at most 8, got values from 2 to 9"):
        voice.check(max_frames_per_token=8)
    with pytest.raises(ValueError, match=r"codes .* at most 2, got values from 1 to 3"):
        voice.check(codebook_size=3)
    with pytest.raises(ValueError, match="has no tokens"):
        FlexiCodecVoice({}).check()
