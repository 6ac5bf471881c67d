"""Budgets of waits and kernels, which decide the speed on a GPU and need none to be counted (tests/counting.py)."""

import threading

import pytest
import torch

from counting import Kernels, OnDevice, Waits
from flexicodec_hf import FlexiCodecConfig, FlexiCodecModel
from flexicodec_hf.generation_flexicodec_ar import RowSampler
from flexicodec_hf.modeling_flexicodec import _exact_convolutions
from model_testers import mask, random_floats


@pytest.fixture(scope="module")
def codec():
    """As many layers and codebooks as the released codec, which decide how many kernels run, and tiny widths."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    return FlexiCodecModel(
        FlexiCodecConfig(
            semantic_model_config={"num_hidden_layers": 50, **size},
            hidden_size=32,
            encoder_hidden_size=2,
            decoder_hidden_size=64,
            aggregator_hidden_size=32,
            aggregator_intermediate_size=32,
            bottleneck_hidden_size=32,
            bottleneck_intermediate_size=32,
            convnext_hidden_size=32,
            convnext_intermediate_size=32,
            num_aggregator_attention_heads=4,
            num_bottleneck_attention_heads=4,
            codebook_size=64,
        )
    ).eval()


def inputs_of(*seconds):
    samples, features = [16_000 * n for n in seconds], [max(1, 50 * n // 3) for n in seconds]
    inputs = {
        "input_values": random_floats((len(seconds), 1, max(samples))) / 10,
        "input_features": random_floats((len(seconds), max(features), 560)),
        "padding_mask": mask(samples),
        "input_features_mask": mask(features),
    }
    return {name: tensor.as_subclass(OnDevice) for name, tensor in inputs.items()}


def test_the_codec_has_the_depth_of_the_released_one(codec):
    config = FlexiCodecConfig()
    for name in ("num_quantizers", "num_aggregator_layers", "num_bottleneck_layers", "num_convnext_layers"):
        assert getattr(codec.config, name) == getattr(config, name), name


@torch.no_grad()
@pytest.mark.parametrize(("seconds", "encode_kernels", "decode_kernels"), [((3,), 1860, 1050), ((3, 2), 2240, 1300)])
def test_waits_and_kernels_stay_in_their_budgets(codec, seconds, encode_kernels, decode_kernels):
    inputs = inputs_of(*seconds)
    with Waits() as waits, Kernels() as kernels:
        encoded = codec.encode(**inputs)
    # Lengths and checks; the number of tokens.
    assert waits.places == ["cpu", "tolist"]
    # 760 of them are the semantic encoder; with padding, a CPU turns the mask of each layer into numbers too.
    assert 1500 < kernels.count < encode_kernels
    with Waits() as waits, Kernels() as kernels:
        codec.decode(encoded.audio_codes, encoded.token_lengths)
    assert waits.places == ["tolist"]
    assert 800 < kernels.count < decode_kernels


@torch.no_grad()
def test_losses_are_computed_only_in_training(codec):
    inputs = inputs_of(1)
    frames = codec.encode_frames(**inputs)
    with Kernels() as alone:
        encoded = codec.quantize_frames(frames, merging_threshold=0.9)
    segments = codec.frame_merger(frames.semantic_frames, frames.num_frames, 0.9)
    with Kernels() as with_losses:
        tokens = codec._quantize(frames, segments, 24)
    assert with_losses.count > alone.count + 24 * 8
    assert torch.equal(tokens.codes, encoded.audio_codes) and tokens.commitment_loss > 0


def test_numbers_of_a_row_come_in_blocks_and_are_those_of_single_draws(device):
    scores = torch.zeros(2, 1000, device=device)
    rows = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sampler = RowSampler(rows)
    expected = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    for step in range(20):
        draws = torch.cat([torch.rand(1, generator=one) for one in expected])
        assert sampler.draw(scores).tolist() == pytest.approx(((1 - draws) * 1000).tolist(), abs=1)
        assert len(sampler.numbers) == 7 - step % 8
    shared = RowSampler(torch.Generator().manual_seed(3))
    one = torch.Generator().manual_seed(3)
    for _ in range(9):
        draws = torch.cat([torch.rand(1, generator=one) for _ in range(2)])
        assert shared.draw(scores).tolist() == pytest.approx(((1 - draws) * 1000).tolist(), abs=1)


def test_encoding_uses_exact_convolutions_and_puts_the_setting_back(codec, device):
    before = torch.backends.cudnn.conv.fp32_precision
    seen = []
    codec.to(device).acoustic_encoder.conv1.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    inputs = {name: tensor.as_subclass(torch.Tensor).to(device) for name, tensor in inputs_of(1).items()}
    with torch.no_grad():
        codec.encode(**inputs)
        codec.exact_convolutions = False
        codec.encode(**inputs)
    codec.to("cpu").exact_convolutions = True
    assert seen == ["ieee" if device == "cuda" else before, before]
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_threads_share_the_setting_of_convolutions():
    before = torch.backends.cudnn.conv.fp32_precision
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with _exact_convolutions(True):
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(10)
    with _exact_convolutions(True):
        second_is_in.set()
        assert first_is_out.wait(10)
        seen.append(torch.backends.cudnn.conv.fp32_precision)
    thread.join()
    assert seen == ["ieee"] and torch.backends.cudnn.conv.fp32_precision == before
    with pytest.raises(RuntimeError, match="mid-way"), _exact_convolutions(True):
        raise RuntimeError("mid-way")
    assert torch.backends.cudnn.conv.fp32_precision == before
