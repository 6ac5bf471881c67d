"""One program over four families of codecs: what works with Mimi, DAC and X-Codec 2 works with FlexiCodec unmerged."""

import inspect

import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecFeatureExtractor,
    MimiConfig,
    MimiModel,
    Xcodec2Config,
    Xcodec2FeatureExtractor,
    Xcodec2Model,
)
from transformers.utils import is_torchaudio_available

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = ["mimi", "dac", "xcodec2", "flexicodec"]


@pytest.fixture(scope="module")
def repository(codec_dir, tmp_path_factory):
    """`repository("mimi")`: a directory with a small codec of the family, random, and its feature extractor."""

    def make(family: str):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        if family == "mimi":
            MimiModel(
                MimiConfig(
                    **TINY,
                    num_hidden_layers=1,
                    num_filters=4,
                    codebook_size=64,
                    codebook_dim=16,
                    num_quantizers=4,
                    vector_quantization_hidden_dimension=16,
                    upsample_groups=32,
                )
            ).save_pretrained(folder)
            EncodecFeatureExtractor(sampling_rate=24_000).save_pretrained(folder)
        elif family == "dac":
            DacModel(
                DacConfig(
                    encoder_hidden_size=4, decoder_hidden_size=64, n_codebooks=4, codebook_size=64, codebook_dim=4
                )
            ).save_pretrained(folder)
            DacFeatureExtractor().save_pretrained(folder)
        elif family == "xcodec2":
            semantic = {
                "model_type": "wav2vec2-bert",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "conv_depthwise_kernel_size": 3,
            }
            Xcodec2Model(
                Xcodec2Config(
                    **TINY,
                    num_hidden_layers=1,
                    encoder_hidden_size=4,
                    quantization_dim=64,
                    semantic_model_config=semantic,
                )
            ).save_pretrained(folder)
            if is_torchaudio_available():
                Xcodec2FeatureExtractor().save_pretrained(folder)
        else:
            codec = FlexiCodecModel.from_pretrained(codec_dir())
            codec.config.merging_threshold = 1.0  # in the repository: the program need not know
            codec.save_pretrained(folder)
            FlexiCodecFeatureExtractor.from_pretrained(codec_dir()).save_pretrained(folder)
        return folder

    return make


def features_of_xcodec2(audio, sampling_rate, return_tensors):
    """Its feature extractor needs torchaudio; where that is missing, inputs of the same shapes."""
    num_frames = len(audio) // 320
    return {
        "input_values": torch.from_numpy(audio[: num_frames * 320])[None, None],
        "input_features": torch.randn(1, num_frames, 160),
        "padding_mask": torch.ones(1, num_frames * 320, dtype=torch.long),
    }


def reconstruct(model_id, audio, device):
    """The program. Nothing in it is of one family, but that DAC does not take the mask that its extractor gives."""
    codec = AutoModel.from_pretrained(model_id).to(device)
    if codec.config.model_type == "xcodec2" and not is_torchaudio_available():
        feature_extractor = features_of_xcodec2
    else:
        feature_extractor = AutoFeatureExtractor.from_pretrained(model_id)
    inputs = feature_extractor(audio, sampling_rate=codec.config.sampling_rate, return_tensors="pt")
    accepted = inspect.signature(codec.encode).parameters
    inputs = {name: value.to(device) for name, value in inputs.items() if name in accepted}
    with torch.no_grad():
        audio_codes = codec.encode(**inputs).audio_codes
        audio_values = codec.decode(audio_codes=audio_codes).audio_values
    return codec.config, audio_codes, audio_values


@pytest.mark.parametrize("family", FAMILIES)
def test_one_program_reconstructs_with_every_family(family, repository, device):
    sampling_rate = 24_000 if family == "mimi" else 16_000
    audio = 0.1 * torch.randn(2 * sampling_rate, generator=torch.Generator().manual_seed(0)).numpy()
    config, audio_codes, audio_values = reconstruct(repository(family), audio, device)

    # The names that a family lacks; docs/language_models.md has the table.
    frame_rate = 50 if family == "xcodec2" else config.frame_rate
    num_quantizers = {"dac": 4, "xcodec2": 1}.get(family) or config.num_quantizers
    assert not audio_codes.is_floating_point() and audio_codes.shape[:2] == (1, num_quantizers)
    assert audio_codes.shape[2] == pytest.approx(2 * frame_rate, abs=2)
    assert int(audio_codes[:, -1].min()) >= 0 and int(audio_codes[:, -1].max()) < getattr(
        config, "codebook_size", 4**8
    )
    assert audio_values.numel() == pytest.approx(2 * sampling_rate, rel=0.05)
    assert audio_values.isfinite().all()


def test_flexicodec_needs_both_inputs_as_xcodec2_does(repository, device):
    for family in ("xcodec2", "flexicodec"):
        codec = AutoModel.from_pretrained(repository(family)).to(device)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input_features'"):
            codec.encode(torch.zeros(1, 1, 16_000, device=device))


def test_flexicodec_names_its_sizes_as_mimi_does(repository):
    folder = repository("flexicodec")
    config = AutoModel.from_pretrained(folder).config
    assert (config.sampling_rate, config.frame_rate, config.num_quantizers, config.codebook_size) == (
        16_000,
        12.5,
        5,
        64,
    )
    # Codebook 0 has more codes than the others.
    assert config.semantic_codebook_size == 32_768
    assert config.merging_threshold == 1.0
    assert AutoModel.from_pretrained(folder, merging_threshold=0.91).config.merging_threshold == 0.91
