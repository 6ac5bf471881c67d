"""Recordings block by block: the tokens and waveforms of `encode` and `decode` with the same chunks."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from conftest import AUDIO, assert_close
from flexicodec_hf import decode_blocks, encode_blocks
from flexicodec_hf.audio_flexicodec import open_audio, read_audio
from flexicodec_hf.chunking_flexicodec import Chunk
from flexicodec_hf.modeling_flexicodec import _common_frames
from flexicodec_hf.streaming_flexicodec import _Recording


@pytest.fixture
def codec(codec_dir, device):
    return AutoModel.from_pretrained(codec_dir()).to(device).eval()


@pytest.fixture
def feature_extractor(codec_dir):
    return AutoFeatureExtractor.from_pretrained(codec_dir())


def join(blocks, name):
    return torch.cat([block[name] for block in blocks], dim=-1)


def cut(waveform, *places):
    return np.split(waveform, places)


@pytest.mark.parametrize("num_samples", [100, 16_000, 190_001])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_quantizers": 1},
        {"target_frame_rate": 6.0},
        {"merging_threshold": 0.3, "chunk_length_s": 0.24},
        {"chunk_length_s": 1.0, "chunk_context_s": 0.0},
    ],
)
@pytest.mark.parametrize("num_positions", [10_006, 150])  # all of it is attended to, or windows
@torch.no_grad()
def test_blocks_give_the_tokens_and_the_waveform_of_the_whole(
    codec, feature_extractor, device, num_samples, options, num_positions
):
    codec.config.semantic_model_config.max_position_embeddings = num_positions
    waveform = read_audio(AUDIO / "librivox_long.flac", 16_000).waveform[:num_samples]
    options = {"chunk_length_s": 3.0, "chunk_context_s": 2.16} | options
    inputs = feature_extractor(waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    expected = codec.encode(**inputs, **options)
    blocks = cut(waveform, 30, 30, 7_000, 7_001, 100_000)
    encoded = list(encode_blocks(codec, feature_extractor, blocks, **options))
    assert torch.equal(join(encoded, "audio_codes"), expected.audio_codes)
    assert torch.equal(join(encoded, "token_lengths"), expected.token_lengths)
    assert_close(join(encoded, "latents"), expected.latents.cpu(), atol=1e-5)
    assert torch.equal(encoded[0].merging_threshold, expected.merging_threshold)

    chunks = {name: value for name, value in options.items() if name.startswith("chunk")}
    waveform = codec.decode(expected.audio_codes, expected.token_lengths, **chunks).audio_values[0, 0]
    for tokens in (encoded, [expected]):
        assert_close(torch.cat(list(decode_blocks(codec, tokens, **chunks))), waveform.cpu(), atol=1e-5)


@pytest.mark.parametrize("hours", [1, 7, 10, 100])
def test_hours_have_the_frames_of_their_samples(codec, feature_extractor, hours):
    """The rounded factor between the frames of the two streams adds up to a frame in six hours."""
    num_samples = hours * 3600 * 16_000
    recording = _Recording(codec, feature_extractor, [], num_samples, Chunk(375, 63))
    assert -2 <= recording.num_frames - num_samples / 1280 <= 0
    lengths = recording._lengths(recording.num_features), recording._lengths(num_samples + 20 * 1280)
    with pytest.raises(ValueError, match="do not belong together"):
        _common_frames(codec.config, *lengths)


def test_a_file_is_encoded_as_it_is_read(codec, feature_extractor, monkeypatch):
    monkeypatch.setattr("flexicodec_hf.audio_flexicodec._BLOCK", 40_000)
    codec.config.semantic_model_config.max_position_embeddings = 180  # attention to chunks
    file = open_audio(AUDIO / "librivox_long.flac", 16_000)
    reading, seen = iter(file), []
    blocks = (seen.append(len(block)) or block for block in reading)
    encoded = encode_blocks(codec, feature_extractor, blocks, file.num_samples, chunk_length_s=3, chunk_context_s=3)
    next(encoded)
    # Of 46.9 seconds: three chunks, the context of the last, and the rest of a block.
    assert sum(seen) < 16 * 16_000
    decoded = decode_blocks(codec, encoded, chunk_length_s=3, chunk_context_s=3)
    assert len(next(decoded)) == 3 * 16_000 - 3 * 16_000 % 3840
    assert sum(seen) < 36 * 16_000  # as long as it may still be short enough for attention to all of it
    waveform = read_audio(AUDIO / "librivox_long.flac", 16_000).waveform
    np.testing.assert_array_equal(np.concatenate(list(file)), waveform)
    assert file.num_samples == len(waveform)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "can be iterated only once"),
        ({"num_samples": 16_000, "target_frame_rate": 6.25}, "can be iterated only once"),
        ({"num_samples": 15_999}, r"`num_samples` is 15999, but the blocks have at least 16000"),
        ({"num_samples": 16_001}, r"`num_samples` is 16001, but the blocks have 16000"),
        ({"num_samples": 0}, "at least one sample"),
        ({"num_samples": 16_000, "chunk_length_s": None}, "`chunk_length_s` must be a number of seconds"),
        ({"num_samples": 16_000, "merging_threshold": 2.0}, "`merging_threshold` is a cosine"),
        ({"num_samples": 16_000, "num_quantizers": 0}, "`num_quantizers` counts"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(codec, feature_extractor, options, message):
    blocks = iter([np.zeros(8_000, dtype=np.float32)] * 2)
    with pytest.raises(ValueError, match=message):
        list(encode_blocks(codec, feature_extractor, blocks, **options))


def test_blocks_that_hold_no_audio_are_refused(codec, feature_extractor):
    for block, message in ((np.zeros(9, dtype=np.int16), "floats"), (np.full(9, np.nan), "NaN")):
        with pytest.raises(ValueError, match=f"a block of `blocks` .*{message}"):
            list(encode_blocks(codec, feature_extractor, [block]))


def test_tokens_that_do_not_fit_are_refused(codec):
    def tokens(lengths, num_quantizers=2):
        codes = torch.zeros(1, num_quantizers, len(lengths), dtype=torch.long)
        return {"audio_codes": codes, "token_lengths": torch.tensor([lengths])}

    with pytest.raises(ValueError, match="hold no tokens"):
        list(decode_blocks(codec, []))
    with pytest.raises(ValueError, match="9"):
        list(decode_blocks(codec, [tokens([1, 9])]))
    with pytest.raises(ValueError, match="as many codebooks, got 2 and 1"):
        list(decode_blocks(codec, [tokens([1, 2]), tokens([1], 1)]))
