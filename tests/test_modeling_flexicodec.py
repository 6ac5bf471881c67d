"""FlexiCodecModel against the reference, stage by stage, and what a model of transformers must do."""

import copy
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForAudioTokenization

from conftest import assert_close
from flexicodec_hf import FlexiCodecConfig, FlexiCodecModel, modeling_flexicodec, optimize_for_cpu
from flexicodec_hf.conversion.checkpoint import SourceCheckpoint
from flexicodec_hf.conversion.tables import CODEC
from flexicodec_hf.modeling_flexicodec import FlexiCodecTransformerLayer, frame_to_token, mean_by_token


TINY_RUNS = ["mid_nq5", "1.0_nq5", "low_nq5", "mid_nq1", "mid_nq3", "allmerge_nq5"]
PROJECTED_RUNS = ["mid_nq5", "1.0_nq5", "low_nq5"]
RUNS = [("codec_tiny", f"b1_thr_{run}") for run in TINY_RUNS] + [
    ("codec_proj", f"b1_thr_{run}") for run in PROJECTED_RUNS
]


@pytest.fixture(scope="module")
def load(codec_dir):
    """`load("codec_tiny", device)`: a converted model in eval mode; `copy.deepcopy` it before changing it."""
    models = {}

    def get(name: str = "codec_tiny", device: str = "cpu") -> FlexiCodecModel:
        if (name, device) not in models:
            models[name, device] = FlexiCodecModel.from_pretrained(codec_dir(name)).eval().to(device)
        return models[name, device]

    return get


@pytest.fixture
def codec(load, device):
    return load("codec_tiny", device)


def clip(golden, name: str, device: str) -> dict[str, torch.Tensor]:
    """The first clip of a codec fixture, as the feature extractor would give it."""
    fixture = golden(name)
    features = fixture["x_b2"][:1] if "x_b2" in fixture else golden("codec_tiny")["x_b2"][:1]
    return {"input_values": fixture["in/audio_b1"][:, None].to(device), "input_features": features.to(device)}


def noise_batch(device: str, num_samples: list[int], seed: int = 0) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Clips of noise with features of noise: each alone, and all in one padded batch."""
    generator = torch.Generator().manual_seed(seed)
    singles = []
    for n in num_samples:
        num_features = math.ceil(max(1 + (n - 400) // 160, 1) / 6)
        singles.append(
            {
                "input_values": torch.randn(1, 1, n, generator=generator).mul(0.1).to(device),
                "input_features": torch.randn(1, num_features, 560, generator=generator).to(device),
            }
        )
    batch = {}
    for key, mask_key, dim in (
        ("input_values", "padding_mask", 2),
        ("input_features", "input_features_mask", 1),
    ):
        lengths = [single[key].shape[dim] for single in singles]
        pad = (0, 0) if dim == 1 else ()
        batch[key] = torch.cat(
            [F.pad(single[key], (*pad, 0, max(lengths) - n)) for single, n in zip(singles, lengths, strict=True)]
        )
        batch[mask_key] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
    return singles, batch


# ------------------------------------------------------------------------------------------------- the reference


def record(stages: dict, module: torch.nn.Module, name: str, inputs: bool = False):
    if inputs:
        return module.register_forward_pre_hook(lambda _, args: stages.update({name: args[0]}))
    return module.register_forward_hook(
        lambda _, __, output: stages.update({name: output[0] if isinstance(output, tuple) else output})
    )


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_stages_match_the_reference(golden, load, device, name, run):
    """Every intermediate tensor that the fixture holds: features and audio to 1e-4, decisions exactly."""
    fixture, model = golden(name), load(name, device)
    spec = fixture.spec["runs"][run]
    stages: dict[str, torch.Tensor] = {}
    channels_last = {
        "semantic_agg_interleaved": (model.semantic_aggregator.transformer, True),
        "semantic_agg_transformer_out": (model.semantic_aggregator.transformer, False),
        "acoustic_agg_interleaved": (model.acoustic_aggregator.transformer, True),
        "semantic_aggregated": (model.semantic_aggregator, False),
        "acoustic_aggregated": (model.acoustic_aggregator, False),
        "convnext_encoder_0": (model.semantic_quantizer.in_proj, False),
        "convnext_encoder_out": (model.semantic_quantizer.encoder[-1], False),
        "semantic_vq": (model.semantic_quantizer.fsq, False),
        "semantic_decoded": (model.semantic_quantizer, False),
        "acoustic_vq_input": (model.acoustic_quantizer, True),
        "acoustic_final_before_bottleneck": (model.bottleneck, True),
        "acoustic_final_after_bottleneck": (model.bottleneck, False),
        **{f"rvq{i}_z_e": (quantizer, False) for i, quantizer in enumerate(model.acoustic_quantizer.quantizers)},
    }
    as_is = {
        "sensevoice_hidden_out": model.semantic_encoder.layers[-1],
        "acoustic_features": model.acoustic_encoder,
        **{f"dac_encoder_block{i + 1}": block.conv1 for i, block in enumerate(model.acoustic_encoder.block)},
        "dac_decoder_0": model.acoustic_decoder.conv1,
        **{f"dac_decoder_{i + 1}": block.res_unit3 for i, block in enumerate(model.acoustic_decoder.block)},
        **{f"semantic_agg_layer{i}": layer for i, layer in enumerate(model.semantic_aggregator.transformer.layers)},
        **{f"bottleneck_layer{i}": layer for i, layer in enumerate(model.bottleneck.layers)},
    }
    hooks = [record(stages, module, key, inputs) for key, (module, inputs) in channels_last.items()]
    hooks += [record(stages, module, key) for key, module in as_is.items()]
    options = {"merging_threshold": spec["threshold"], "num_quantizers": spec["num_quantizers"]}
    try:
        with torch.no_grad():
            encoded = model.encode(**clip(golden, name, device), **options)
            semantic_stages = dict(stages)
            decoded = model.decode(**encoded)
    finally:
        for hook in hooks:
            hook.remove()

    # The quantizers and the semantic path run again in `decode`, on codes.
    stages |= {key: value for key, value in semantic_stages.items() if not key.startswith(("bottleneck", "dac_dec"))}
    compared = set()
    for key in stages:
        if f"{run}/{key}" in fixture:
            value = stages[key].transpose(1, 2) if key in channels_last else stages[key]
            expected = fixture[f"{run}/{key}"]
            assert_close(value, expected, atol=1e-4 * max(1.0, expected.abs().max().item()))
            compared.add(key)
    missing = {key for key in channels_last | as_is if f"{run}/{key}" in fixture} - compared
    if spec["num_quantizers"] == 1:  # ours does not compute what it does not need
        missing = {key for key in missing if not key.startswith(("acoustic", "dac_encoder", "rvq"))}
    assert not missing
    assert len(compared) >= (30 if run == "b1_thr_mid_nq5" and name == "codec_tiny" else 3)

    assert torch.equal(encoded.token_lengths.cpu(), fixture[f"{run}/token_lengths"])
    assert encoded.audio_codes_mask.all()
    assert torch.equal(encoded.audio_codes[:, :1].cpu(), fixture[f"{run}/semantic_codes"].long())
    assert encoded.audio_codes.shape[1] == spec["num_quantizers"]
    if spec["num_quantizers"] > 1:
        assert torch.equal(encoded.audio_codes[:, 1:].cpu(), fixture[f"{run}/acoustic_codes"])
    assert_close(encoded.frame_similarities, fixture[f"{run}/sim"])
    assert_close(encoded.latents, fixture[f"{run}/decoder_latent"])
    assert_close(model.get_semantic_features(encoded.audio_codes), fixture[f"{run}/get_semantic_feature"])
    assert_close(decoded.audio_values, fixture[f"{run}/audio"])
    assert_close(
        model.decode(latents=encoded.latents, token_lengths=encoded.token_lengths)[0], fixture[f"{run}/audio"]
    )


@torch.no_grad()
def test_batch_items_match_their_lone_reference_runs(golden, codec, device):
    """Item 0 of the fixture's batch of two is the clip of its single runs: batched, it gives the single result."""
    fixture, run = golden("codec_tiny"), "b1_thr_mid_nq5"
    lengths = fixture["in/audio_lens_b2"]
    feature_lengths = fixture["x_lens_b2"]
    encoded = codec.encode(
        fixture["in/audio_b2"][:, None].to(device),
        fixture["x_b2"].to(device),
        (torch.arange(fixture["in/audio_b2"].shape[1]) < lengths[:, None]).to(device),
        (torch.arange(fixture["x_b2"].shape[1]) < feature_lengths[:, None]).to(device),
        merging_threshold=fixture.spec["runs"][run]["threshold"],
    )
    num_tokens = fixture[f"{run}/token_lengths"].shape[1]
    assert torch.equal(encoded.token_lengths[:1, :num_tokens].cpu(), fixture[f"{run}/token_lengths"])
    assert torch.equal(encoded.audio_codes[:1, 1:, :num_tokens].cpu(), fixture[f"{run}/acoustic_codes"])
    assert_close(codec.decode(**encoded).audio_values[:1], fixture[f"{run}/audio"])


@pytest.mark.parametrize("masked", [True, False])
def test_semantic_encoder_matches_the_reference(golden, device, masked):
    """`FunAsrNanoEncoder` with converted weights is the reference's SenseVoice, with and without padding."""
    fixture = golden("sensevoice")
    conf = fixture.spec["config"]["encoder_conf"]
    config = FlexiCodecConfig(
        semantic_model_config={
            "hidden_size": conf["output_size"],
            "intermediate_size": conf["linear_units"],
            "num_hidden_layers": conf["num_blocks"],
        }
    )
    encoder = AutoModel.from_config(config.semantic_model_config).eval()
    weights = {f"semantic_model.{name}": tensor for name, tensor in fixture.weights.items()}
    source = SourceCheckpoint("sensevoice.safetensors", weights)
    for name, parameter in encoder.state_dict().items():
        parameter.copy_(CODEC.read(source, f"semantic_encoder.{name}", config))
    encoder.to(device)

    run = "masked" if masked else "codec_path"
    features = fixture["in/speech"]
    queries = fixture.weights["embed.weight"][torch.tensor(config.semantic_query_ids)]
    features = torch.cat([queries.expand(features.shape[0], -1, -1), features], dim=1)
    assert torch.equal(features, fixture["prepended"])
    lengths = fixture["in/speech_lengths"] + 4 if masked else torch.tensor([features.shape[1]] * len(features))
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    stages: dict[str, torch.Tensor] = {}
    hooks = [record(stages, layer, f"layer{i}_raw") for i, layer in enumerate(encoder.layers[:-1])]
    with torch.no_grad():
        stages["hidden_out"] = encoder(features.to(device), mask.to(device)).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(stages) == 3
    for name, value in stages.items():
        assert_close(value.cpu()[mask], fixture[f"{run}/{name}"][mask])


def reference_gradient(golden, model: FlexiCodecModel, name: str) -> torch.Tensor:
    """The gradient that the reference's parameter would have, from ours and, for weight norm, the chain rule."""
    base, _, leaf = name.rpartition(".")
    source_name = f"{base}.weight" if leaf in ("weight_g", "weight_v") else name
    (ours,) = [key for key, _ in model.named_parameters() if CODEC.source_names(key, model.config) == [source_name]]
    parameter = model.get_parameter(ours)
    if parameter.grad is None:
        return None
    gradient = parameter.grad.cpu()
    if leaf in ("weight_g", "weight_v"):
        weights = golden("codec_tiny").weights
        magnitude, direction = weights[f"{base}.weight_g"], weights[f"{base}.weight_v"]
        norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))
        gradient, unit = gradient.view(direction.shape), direction / norm
        along = (gradient * unit).flatten(1).sum(dim=1).view(norm.shape)
        gradient = along if leaf == "weight_g" else magnitude / norm * (gradient - along * unit)
    return gradient.view(golden("codec_tiny").weights[name].shape)


@pytest.mark.parametrize("run", ["b1_quantized", "b1_bypassed", "b2_unmerged"])
def test_training_forward_matches_the_reference(golden, load, device, run):
    """Losses, reconstruction and gradients of a training step, with the reference's random draws put in."""
    fixture, model = golden("codec_train"), copy.deepcopy(load("codec_tiny", device)).train()
    spec = fixture.spec["runs"][run]
    batch_size = 2 if run.startswith("b2") else 1
    draws = spec["draws"]
    num_quantizers = 1 if spec["bypassed"] else torch.tensor(draws["n_quantizers"]) + 1
    output = model(
        fixture["in/audio"][:batch_size, None].to(device),
        fixture["in/x"][:batch_size].to(device),
        merging_threshold=draws["threshold"],
        num_quantizers=num_quantizers,
    )
    assert torch.equal(output.audio_codes[:, :1].cpu(), fixture[f"{run}/semantic_codes"].long())
    if not spec["bypassed"]:
        assert torch.equal(output.audio_codes[:, 1:].cpu(), fixture[f"{run}/acoustic_codes"])
    assert_close(output.audio_values, fixture[f"{run}/audio"])
    for name in ("commitment_loss", "codebook_loss"):
        assert_close(getattr(output, name), fixture[f"{run}/{name}"], atol=1e-4, rtol=1e-5)
    assert_close(output.distillation_loss * 15, fixture[f"{run}/distill_loss"], atol=1e-4, rtol=1e-5)
    toy_loss = output.audio_values.square().mean() + output.loss
    assert_close(toy_loss, fixture[f"{run}/toy_loss"], atol=1e-4, rtol=1e-5)

    toy_loss.backward()
    names = fixture.spec["gradients"]
    assert len(names) > 10
    for name in names:
        gradient = reference_gradient(golden, model, name)
        if name in spec["without_gradient"]:
            assert gradient is None or not gradient.any(), name
        else:
            expected = fixture[f"{run}/grad/{name}"]
            assert_close(gradient, expected, atol=3e-4 * expected.abs().max().item() + 1e-7)


# --------------------------------------------------------------------------------------------------- merging


def test_threshold_one_never_merges(codec, device):
    """Bit-identical frames have a cosine that float32 may round past 1: they still keep a token each."""
    features = torch.randn(1, 1, 560, generator=torch.Generator().manual_seed(1)).expand(4, 50, -1).contiguous()
    merger, frame_mask = codec.frame_merger, torch.ones(4, 50, dtype=torch.bool, device=device)
    similarities = merger.similarities(features.to(device), frame_mask)
    assert similarities.max() <= 1
    token_lengths = merger.segment(similarities, torch.ones(4, device=device), frame_mask)
    assert token_lengths.shape == (4, 50) and (token_lengths == 1).all()
    token_lengths = merger.segment(similarities, torch.full((4,), 0.99, device=device), frame_mask)
    assert token_lengths[0].tolist() == [8] * 6 + [2]


def test_padding_is_no_token(codec, device):
    """Segmentation by hand: similarities above the threshold merge, within the frames of each item."""
    merger = codec.frame_merger
    similarities = torch.tensor([[0.9, 0.5, 0.9, 0.9, 0.5], [0.9, 0.9, 0.0, 0.0, 0.0]], device=device)
    frame_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3], device=device)
    token_lengths = merger.segment(similarities, torch.tensor([0.8, -1.0], device=device), frame_mask)
    assert token_lengths.tolist() == [[2, 3, 1], [3, 0, 0]]
    segments = merger(torch.ones(2, 6, 4, device=device), torch.tensor([6, 3]), merging_threshold=[0.8, 1.0])
    assert segments.token_lengths.tolist() == [[6, 0, 0], [1, 1, 1]]
    assert torch.equal(segments.token_mask, segments.token_lengths > 0)
    assert torch.equal(segments.frame_mask, frame_mask)


@pytest.mark.parametrize("rate", [1.5625, 2.0, 3.3, 6.25, 8.0, 12.4, 12.5])
@torch.no_grad()
def test_target_frame_rate_is_as_near_as_any_threshold_gets(codec, device, rate):
    singles, batch = noise_batch(device, [52_000, 9_000, 1_000, 30_000])
    encoded = codec.encode(**batch, target_frame_rate=rate, num_quantizers=1)
    for i, single in enumerate(singles):
        num_frames = int(encoded.token_lengths[i].sum())
        wanted = rate / 12.5 * num_frames
        similarities = encoded.frame_similarities[i : i + 1, : num_frames - 1]
        frame_mask = torch.ones(1, num_frames, dtype=torch.bool, device=device)
        counts = {
            codec.frame_merger.segment(similarities, torch.tensor([t], device=device), frame_mask).shape[1]
            for t in [-1.0, *similarities[0].tolist()]
        }
        num_tokens = int(encoded.audio_codes_mask[i].sum())
        assert abs(num_tokens - wanted) == min(abs(count - wanted) for count in counts)
        alone = codec.encode(**single, merging_threshold=encoded.merging_threshold[i].item(), num_quantizers=1)
        assert torch.equal(alone.token_lengths[0], encoded.token_lengths[i, :num_tokens])


@pytest.mark.parametrize("chunk", [None, 1.0])
@torch.no_grad()
def test_semantic_codes_need_no_acoustic_encoder(codec, device, monkeypatch, chunk):
    _, batch = noise_batch(device, [52_000, 9_000])
    expected = codec.encode(**batch, chunk_length_s=chunk)
    features = codec.get_semantic_features(expected.audio_codes, expected.audio_codes_mask)
    monkeypatch.setattr(codec.acoustic_encoder, "forward", None)
    monkeypatch.setattr(codec.acoustic_aggregator, "forward", None)
    encoded = codec.encode(**batch, num_quantizers=1, chunk_length_s=chunk)
    assert torch.equal(encoded.audio_codes, expected.audio_codes[:, :1])
    assert torch.equal(encoded.token_lengths, expected.token_lengths)
    assert_close(encoded.latents, features.cpu(), atol=1e-5)

    frames = codec.encode_frames(**batch, num_quantizers=1, chunk_length_s=chunk)
    assert frames.acoustic_frames is None
    with pytest.raises(ValueError, match="`num_quantizers=1`, which leaves nothing to make 5 codebooks of"):
        codec.quantize_frames(frames)


@pytest.mark.parametrize("chunk", [None, 1.0])
@torch.no_grad()
def test_tokens_can_be_segmented_by_the_caller(codec, device, chunk):
    singles, batch = noise_batch(device, [52_000, 9_000])
    frames = codec.encode_frames(**batch, chunk_length_s=chunk)
    merged = codec.quantize_frames(frames, merging_threshold=0.9, chunk_length_s=chunk)
    again = codec.quantize_frames(frames, token_lengths=merged.token_lengths, chunk_length_s=chunk)
    assert torch.equal(again.audio_codes, merged.audio_codes) and torch.equal(again.latents, merged.latents)
    assert again.merging_threshold is None

    lengths = [[3] * (n // 3) + [n % 3] * (n % 3 > 0) for n in frames.num_frames.tolist()]
    padded = torch.tensor([row + [0] * (len(lengths[0]) - len(row)) for row in lengths], device=device)
    encoded = codec.quantize_frames(frames, token_lengths=padded, chunk_length_s=chunk)
    assert torch.equal(encoded.token_lengths, padded) and torch.equal(encoded.audio_codes_mask, padded > 0)
    for single, row, codes in zip(singles, lengths, encoded.audio_codes, strict=True):
        alone = codec.encode_frames(**single, chunk_length_s=chunk)
        alone = codec.quantize_frames(alone, token_lengths=torch.tensor([row]), chunk_length_s=chunk)
        assert torch.equal(alone.audio_codes[0], codes[:, : len(row)])


@torch.no_grad()
def test_errors_of_segmentation(codec, device):
    _, batch = noise_batch(device, [12_800, 6_400])
    frames = codec.encode_frames(**batch)
    assert frames.num_frames.tolist() == [9, 5]
    for lengths, message in (
        ([[5, 5]], r"integers of the shape \(batch_size, num_tokens\) = \(2, num_tokens\), got .* of \(1, 2\)"),
        ([[5.0, 5.0], [5.0, 0.0]], "got torch.float32"),
        ([[5, 4], [5, 1]], r"must cover \[9, 5\] frames, one number an item, and cover \[9, 6\]"),
        ([[9, 0], [5, 0]], "must be 1 to 8, with 0 only after"),
        ([[5, 4], [0, 5]], "must be 1 to 8, with 0 only after"),
        ([[8, 2, -1], [5, 0, 0]], "must be 1 to 8, with 0 only after"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.quantize_frames(frames, token_lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="either `token_lengths`, or"):
        codec.quantize_frames(frames, token_lengths=torch.tensor([[5, 4], [5, 0]]), merging_threshold=0.9)


@torch.no_grad()
def test_rates_and_thresholds_may_differ_per_item(codec, device):
    _, batch = noise_batch(device, [52_000, 40_000, 30_000])
    rates = [3.0, 6.0, 12.5]
    encoded = codec.encode(**batch, target_frame_rate=rates)
    achieved = 12.5 * encoded.audio_codes_mask.sum(1) / encoded.token_lengths.sum(1)
    assert torch.allclose(achieved.cpu(), torch.tensor(rates), atol=0.6)
    again = codec.encode(**batch, merging_threshold=encoded.merging_threshold)
    assert torch.equal(again.token_lengths, encoded.token_lengths)


def test_tokens_cover_their_frames(device):
    token_lengths = torch.tensor([[2, 1, 3], [4, 0, 0]], device=device)
    assert frame_to_token(token_lengths, 6).tolist() == [[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 2, 2]]
    frames = torch.arange(12, dtype=torch.float32, device=device).view(2, 6, 1)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2], device=device)
    means = mean_by_token(frames, token_lengths, mask)
    assert means[0, :, 0].tolist() == [0.5, 2.0, 4.0]
    assert means[1, 0, 0].item() == 7.5


# ------------------------------------------------------------------------------------------------- exact batches


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_gives_each_item_what_it_gets_alone(codec, device, seed):
    generator = torch.Generator().manual_seed(seed)
    num_samples = torch.randint(1, 60_000, (5,), generator=generator).tolist()
    thresholds = (0.8 + 0.2 * torch.rand(5, generator=generator)).tolist()
    singles, batch = noise_batch(device, num_samples, seed)
    with torch.no_grad():
        encoded = codec.encode(**batch, merging_threshold=thresholds)
        decoded = codec.decode(**encoded)
        output = codec(**batch, merging_threshold=thresholds)
        for i, single in enumerate(singles):
            alone = codec.encode(**single, merging_threshold=thresholds[i])
            num_tokens = alone.audio_codes.shape[2]
            assert torch.equal(encoded.audio_codes[i, :, :num_tokens], alone.audio_codes[0])
            assert torch.equal(encoded.token_lengths[i, :num_tokens], alone.token_lengths[0])
            assert encoded.audio_codes_mask[i].sum() == num_tokens
            assert not encoded.audio_codes[i, :, num_tokens:].any() and not encoded.token_lengths[i, num_tokens:].any()
            assert_close(encoded.latents[i, :, :num_tokens], alone.latents[0].cpu(), atol=1e-5)

            wave = codec.decode(**alone).audio_values[0]
            assert_close(decoded.audio_values[i, :, : wave.shape[1]], wave.cpu(), atol=1e-5)
            assert not decoded.audio_values[i, :, wave.shape[1] :].any()
            assert decoded.padding_mask[i].sum() == wave.shape[1]

            features = codec.get_semantic_features(alone.audio_codes)
            batched = codec.get_semantic_features(encoded.audio_codes, encoded.audio_codes_mask)[i]
            assert_close(batched[:, :num_tokens], features[0].cpu(), atol=1e-5)

            whole = codec(**single, merging_threshold=thresholds[i]).audio_values[0]
            assert whole.shape[1] == num_samples[i]
            assert_close(output.audio_values[i, :, : num_samples[i]], whole.cpu(), atol=1e-5)
            assert not output.audio_values[i, :, num_samples[i] :].any()


def test_training_losses_of_a_batch_ignore_padding(load, device):
    """The losses of a padded batch are means over valid tokens."""
    model = copy.deepcopy(load("codec_tiny", device)).train()
    singles, batch = noise_batch(device, [40_000, 12_000])
    options = {"merging_threshold": 0.9, "num_quantizers": 5}
    both = model(**batch, **options)
    alone = [model(**single, **options) for single in singles]
    assert_close(both.commitment_loss, sum(output.commitment_loss.cpu() for output in alone) / 2, atol=1e-4)
    tokens = both.audio_codes_mask.sum(dim=1).cpu()
    expected = sum(n * output.distillation_loss.cpu() for n, output in zip(tokens, alone, strict=True)) / tokens.sum()
    assert_close(both.distillation_loss, expected.detach(), atol=1e-4)


@torch.no_grad()
def test_token_lengths_alone_tell_the_padding(codec, device):
    """Tokens behind the last one with a length are padding; a length of 0 between others is an error."""
    _, batch = noise_batch(device, [30_000, 12_000])
    encoded = codec.encode(**batch, merging_threshold=0.9)
    with_mask = codec.decode(**encoded).audio_values
    without = codec.decode(encoded.audio_codes, encoded.token_lengths).audio_values
    assert torch.equal(with_mask, without)
    lengths = encoded.token_lengths[:1].clone()
    lengths[0, 1] = 0
    with pytest.raises(ValueError, match=r"must be 1 to 8, with 0 only after the last token.*got values from 0 to"):
        codec.decode(encoded.audio_codes[:1], lengths)


# --------------------------------------------------------------------------------------------------- long audio


@torch.no_grad()
@pytest.mark.parametrize("is_short, context", [(True, 2.16), (True, 60), (False, 60)])
def test_chunks_equal_the_whole(codec, device, monkeypatch, is_short, context):
    """Up to what the semantic encoder takes in one piece; with a context as long as the recording, beyond it too."""
    _, batch = noise_batch(device, [16_000 * 7, 16_000 * 4 + 77, 900])
    chunks = {"chunk_length_s": 2, "chunk_context_s": context}
    whole = codec.encode(**batch, merging_threshold=0.9)
    decoded = codec.decode(**whole)
    if not is_short:
        forget_what_is_whole(monkeypatch)
    chunked = codec.encode(**batch, merging_threshold=0.9, **chunks)
    assert torch.equal(whole.token_lengths, chunked.token_lengths)
    assert torch.equal(whole.audio_codes, chunked.audio_codes)
    assert_close(chunked.latents, whole.latents.cpu(), atol=1e-5)
    assert_close(codec.decode(**whole, **chunks).audio_values, decoded.audio_values.cpu(), atol=1e-5)


def forget_what_is_whole(monkeypatch):
    """The attention always sees a chunk with its context, as in recordings of more than ten minutes."""
    monkeypatch.setattr(modeling_flexicodec, "_whole_frames", lambda config: 0)
    run = modeling_flexicodec.run_in_windows
    monkeypatch.setattr(
        modeling_flexicodec, "run_in_windows", lambda *args, whole_length=0, **options: run(*args, **options)
    )


@torch.no_grad()
def test_long_and_short_items_of_a_batch_are_in_chunks_as_alone(load, device):
    model = copy.deepcopy(load("codec_tiny", device))
    model.config.semantic_model_config.max_position_embeddings = 110  # the first is long
    singles, batch = noise_batch(device, [16_000 * 7, 16_000 * 4 + 77, 900])
    chunks = {"chunk_length_s": 2, "chunk_context_s": 2.16}
    batched = model.encode(**batch, merging_threshold=0.9, **chunks)
    decoded = model.decode(**batched, **chunks)
    for item, single in enumerate(singles):
        options = chunks if item == 0 else {}
        alone = model.encode(**single, merging_threshold=0.9, **options)
        num_tokens = alone.token_lengths.shape[1]
        assert torch.equal(alone.token_lengths[0], batched.token_lengths[item, :num_tokens])
        assert torch.equal(alone.audio_codes[0], batched.audio_codes[item, :, :num_tokens])
        waveform = model.decode(**alone, **chunks).audio_values[0, 0]
        assert_close(decoded.audio_values[item, 0, : len(waveform)], waveform.cpu(), atol=1e-5)
        assert not decoded.audio_values[item, 0, len(waveform) :].any()


@torch.no_grad()
def test_convolutions_are_exact_in_chunks(codec, device):
    """The context covers the receptive field of the acoustic encoder, so that only attention sees the seams."""
    singles, _ = noise_batch(device, [16_000 * 9])
    whole = codec.encode_frames(**singles[0]).acoustic_frames
    chunked = codec.encode_frames(**singles[0], chunk_length_s=1.0, chunk_context_s=2.1).acoustic_frames
    assert_close(chunked, whole.cpu(), atol=5e-5)
    cut = codec.encode_frames(**singles[0], chunk_length_s=1.0, chunk_context_s=0.0).acoustic_frames
    assert (cut - whole).abs().max() > 1e-3


@torch.no_grad()
def test_chunks_fade_into_each_other(codec, device):
    """At a seam the waveform takes no step larger than the whole waveform's own."""
    singles, _ = noise_batch(device, [16_000 * 8])
    encoded = codec.encode(**singles[0], merging_threshold=0.9)
    whole = codec.decode(**encoded).audio_values[0, 0]
    chunked = codec.decode(**encoded, chunk_length_s=2, chunk_context_s=0.24).audio_values[0, 0]
    assert chunked.shape == whole.shape
    steps = (chunked - whole).diff().abs()
    assert 0 < steps.max() < whole.diff().abs().max() / 2


def test_audio_beyond_the_position_table_asks_for_chunks(load, device):
    model = copy.deepcopy(load("codec_tiny", device))
    model.config.semantic_model_config.max_position_embeddings = 60
    singles, _ = noise_batch(device, [16_000 * 5])
    with pytest.raises(ValueError, match=r"83 frames.*end at 55.*chunk_length_s"):
        model.encode(**singles[0])


# ------------------------------------------------------------------------------------------ a transformers model


def test_saves_and_loads(load, tmp_path, device, golden):
    model = load("codec_tiny", device)
    model.save_pretrained(tmp_path)
    inputs = clip(golden, "codec_tiny", device)
    expected = model(**inputs)
    for auto_class in (AutoModel, AutoModelForAudioTokenization):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, FlexiCodecModel)
        assert not any(info.values())
        output = loaded.to(device)(**inputs)
        assert torch.equal(output.audio_codes, expected.audio_codes)
        assert torch.equal(output.audio_values, expected.audio_values)


def test_fresh_weights_are_initialized():
    """Models are built on the meta device: nothing may be left as it was in memory."""
    config = FlexiCodecConfig(
        semantic_model_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32},
        hidden_size=32, encoder_hidden_size=2, decoder_hidden_size=32, num_aggregator_layers=1,
        num_bottleneck_layers=1, aggregator_hidden_size=32, bottleneck_hidden_size=32,
        convnext_hidden_size=8, num_convnext_layers=1,
    )  # fmt: skip
    model = FlexiCodecModel(config)
    with torch.device("meta"):
        hollow = FlexiCodecModel(config)
    hollow.to_empty(device="cpu")
    for tensor in [*hollow.parameters(), *hollow.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
        tensor._is_hf_initialized = False
    for module in hollow.modules():
        module._is_hf_initialized = False
    hollow.init_weights()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*hollow.named_parameters(), *hollow.named_buffers()]:
        assert tensor.isfinite().all(), name
        assert tensor.shape == tensors.pop(name).shape, name
    assert not tensors
    assert torch.equal(hollow.semantic_quantizer.fsq.levels, torch.tensor([8] * 5))
    assert all(
        (layer.mlp_layer_scale == 0.01).all()
        for layer in hollow.modules()
        if isinstance(layer, FlexiCodecTransformerLayer)
    )


@torch.no_grad()
def test_hooks_run_on_every_module(load, golden, device):
    """Nothing goes round the modules, not even without gradients."""
    model = load("codec_tiny", device)
    called = set()
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList)}
    hooks = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in modules.items()]
    model(**clip(golden, "codec_tiny", device))
    model.decode(model.encode(**clip(golden, "codec_tiny", device)).audio_codes)
    for hook in hooks:
        hook.remove()
    # The projections into the small spaces of the quantizers run in float32, on the weights alone.
    small = re.compile(r"semantic_quantizer.fsq.project_in|acoustic_quantizer.quantizers.\d+.in_proj")
    missing = {name for name in modules.keys() - called if not small.fullmatch(name)}
    assert not missing


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["semantic_encoder.layers.0.mlp.fc1", "acoustic_encoder.block.0.res_unit1.conv2", "bottleneck.layers.0.fc1"],
)
def test_a_replaced_layer_takes_effect(load, golden, device, name):
    """What quantization libraries do: put another module in the place of a layer."""

    class Quantized(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states):
            return (self.layer(hidden_states) * 4).round() / 4

    model = copy.deepcopy(load("codec_tiny", device))
    inputs = clip(golden, "codec_tiny", device)
    frames = model.encode_frames(**inputs)
    audio_values = model(**inputs).audio_values
    model.set_submodule(name, Quantized(model.get_submodule(name)))
    changed = model.encode_frames(**inputs)
    for before, after in zip(frames[:2], changed[:2], strict=True):
        where = "semantic_encoder" if before is frames[0] else "acoustic_encoder"
        assert torch.equal(before, after) is not name.startswith(where)
    assert not torch.equal(model(**inputs).audio_values, audio_values)


def test_outputs_as_tuples(codec, golden, device):
    inputs = clip(golden, "codec_tiny", device)
    encoded = codec.encode(**inputs, return_dict=False)
    assert isinstance(encoded, tuple) and torch.equal(encoded[0], codec.encode(**inputs).audio_codes)
    assert isinstance(codec.decode(*encoded[:3], return_dict=False), tuple)
    assert isinstance(codec(**inputs, return_dict=False), tuple)


@torch.no_grad()
def test_eager_attention_equals_sdpa(codec_dir, codec, device):
    eager = FlexiCodecModel.from_pretrained(codec_dir(), attn_implementation="eager").eval().to(device)
    assert eager.semantic_encoder.config._attn_implementation == "eager"
    _, batch = noise_batch(device, [30_000, 12_000])
    expected, output = codec(**batch), eager(**batch)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    assert_close(output.audio_values, expected.audio_values.detach().cpu(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_near(codec_dir, codec, golden, device, dtype):
    half = FlexiCodecModel.from_pretrained(codec_dir(), dtype=dtype).eval().to(device)
    inputs = clip(golden, "codec_tiny", device)
    encoded = codec.encode(**inputs, merging_threshold=0.8836)
    output = half(**inputs)
    assert output.audio_values.dtype == dtype and output.audio_values.isfinite().all()
    audio_values = half.decode(**encoded).audio_values.float()
    expected = codec.decode(**encoded).audio_values
    assert (audio_values - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_float16_bears_an_alpha_that_is_nearly_0(codec, device):
    snake = copy.deepcopy(codec.acoustic_encoder.snake1)
    values = torch.randn(1, snake.alpha.shape[1], 50, device=device)
    for alpha in (0.0, 1e-7, 1e-3, 1.0):
        snake.float().alpha.fill_(alpha)
        expected = snake(values)
        assert_close(snake.half()(values.half()).float(), expected.cpu(), atol=2e-2)
        if device == "cpu":
            fast = optimize_for_cpu(copy.deepcopy(snake))
            assert torch.equal(fast(values.half()), snake(values.half()))


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [11, 4])
def test_the_semantic_encoder_is_that_of_transformers_to_the_bit(device, kernel_size):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = FlexiCodecConfig(semantic_model_config=sizes | {"fsmn_kernel_size": kernel_size})
    ours = FlexiCodecModel(config).semantic_encoder.eval().to(device)
    theirs = AutoModel.from_config(config.semantic_model_config).eval().to(device)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 20, 560, device=device)
    for lengths in ([20, 20], [20, 13]):
        mask = torch.arange(20, device=device) < torch.tensor(lengths, device=device)[:, None]
        expected = theirs(features, mask).last_hidden_state
        padded = lengths[1] < 20
        assert torch.equal(ours(features, mask if padded else None).last_hidden_state, expected)


def test_gradient_checkpointing_changes_nothing(load, golden, device):
    inputs = clip(golden, "codec_tiny", device)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(load("codec_tiny", device)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(**inputs, merging_threshold=0.9, num_quantizers=3)
        (output.audio_values.square().mean() + output.loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient.cpu(), atol=1e-5, rtol=1e-4)


def test_training_draws_and_frozen_encoder(load, golden, device):
    model = copy.deepcopy(load("codec_tiny", device)).train()
    assert model.training and not model.semantic_encoder.training
    inputs = clip(golden, "codec_tiny", device)
    torch.manual_seed(0)
    outputs = [model(**inputs) for _ in range(16)]
    thresholds = {output.merging_threshold.item() for output in outputs}
    assert len(thresholds) == 16 and all(0.8 <= threshold <= 1.0 for threshold in thresholds)
    rows = [output.audio_codes.shape[1] for output in outputs]
    assert set(rows) == {1, 5} and rows.count(1) < rows.count(5)
    (outputs[0].audio_values.square().mean() + outputs[0].loss).backward()
    assert all(p.grad is None for p in model.semantic_encoder.parameters())
    assert model.semantic_query_embedding.weight.grad is None
    torch.manual_seed(0)
    assert torch.equal(model(**inputs).audio_values, outputs[0].audio_values)
    model.eval()
    assert torch.equal(model(**inputs).audio_values, model(**inputs).audio_values)


@torch.no_grad()
def test_arguments_leave_no_trace(codec, golden, device):
    inputs = clip(golden, "codec_tiny", device)
    before = codec.encode(**inputs)
    codec.encode(**inputs, merging_threshold=0.8, num_quantizers=1)
    after = codec.encode(**inputs)
    assert torch.equal(before.audio_codes, after.audio_codes)
    assert torch.equal(before.merging_threshold.cpu(), torch.tensor([0.91]))


def test_decode_compiles_without_graph_breaks(codec, device):
    _, batch = noise_batch(device, [30_000, 12_000])
    encoded = codec.encode(**batch, merging_threshold=0.9)
    num_frames = int(encoded.token_lengths.sum(dim=1).max())
    torch.compiler.reset()
    with torch.no_grad():
        decode = torch.compile(codec.decode, backend="eager", fullgraph=True)
        output = decode(**encoded, num_frames=num_frames).audio_values
        assert_close(output, codec.decode(**encoded).audio_values.cpu(), atol=1e-5)
        codes = encoded.audio_codes[:1]
        assert_close(decode(codes).audio_values, codec.decode(codes).audio_values.cpu(), atol=1e-5)


@pytest.mark.slow
def test_decode_compiles_with_inductor(codec, device):
    codes = torch.randint(0, 64, (1, 5, 20), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        output = torch.compile(codec.decode, fullgraph=True)(codes).audio_values
    assert_close(output, codec.decode(codes).audio_values.cpu(), atol=1e-5)


@torch.no_grad()
def test_decode_of_fewer_rows(codec, golden, device):
    encoded = codec.encode(**clip(golden, "codec_tiny", device), merging_threshold=0.9)
    for rows in (1, 3):
        fewer = codec.encode(**clip(golden, "codec_tiny", device), merging_threshold=0.9, num_quantizers=rows)
        assert torch.equal(fewer.audio_codes, encoded.audio_codes[:, :rows])
        output = codec.decode(encoded.audio_codes[:, :rows], encoded.token_lengths).audio_values
        assert_close(output, codec.decode(**fewer).audio_values.cpu(), atol=1e-5)
    all_of_them = codec.encode(**clip(golden, "codec_tiny", device), merging_threshold=0.9, num_quantizers=99)
    assert torch.equal(all_of_them.audio_codes, encoded.audio_codes)


@torch.no_grad()
def test_decode_is_as_long_as_the_mask_that_it_gets(codec, device):
    model, encoded = codec.to(device), torch.randint(0, 60, (2, 5, 4), device=device)
    whole = model.decode(encoded).audio_values
    num_samples = whole.shape[-1]
    lengths = torch.tensor([[num_samples + 10], [num_samples - 500]], device=device)
    mask = torch.arange(num_samples + 10, device=device) < lengths
    output = model.decode(encoded, padding_mask=mask)
    assert output.audio_values.shape == (2, 1, num_samples + 10) and torch.equal(output.padding_mask, mask)
    assert torch.equal(output.audio_values[0, :, :num_samples], whole[0])
    assert torch.equal(output.audio_values[1, :, : num_samples - 500], whole[1, :, : num_samples - 500])
    assert not output.audio_values[0, :, num_samples:].any() and not output.audio_values[1, :, -510:].any()
    cut = model.decode(encoded, padding_mask=mask[:, :1000].int())
    assert torch.equal(cut.audio_values, whole[..., :1000]) and cut.padding_mask.dtype == torch.bool
    with pytest.raises(ValueError, match=r"`padding_mask` must have the shape .* = \(2, num_samples\), got \(1, 9\)"):
        model.decode(encoded, padding_mask=mask[:1, :9])


def test_decode_without_lengths_is_a_frame_each(codec, device):
    codes = torch.randint(0, 64, (2, 5, 7), generator=torch.Generator().manual_seed(0)).to(device)
    output = codec.decode(codes).audio_values
    assert output.shape == (2, 1, 7 * 1280 - 16)
    assert_close(output, codec.decode(codes, torch.ones(2, 7, dtype=torch.long, device=device))[0].cpu(), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_values": torch.zeros(1, 16_000)}, r"`input_values` must have the shape.*\(1, 16000\)"),
        ({"input_values": torch.zeros(1, 2, 16_000)}, r"`input_values` must have the shape"),
        ({"input_values": torch.zeros(1, 1, 0)}, "audio is empty"),
        ({"input_features": torch.zeros(1, 17, 80)}, r"`input_features` must have the shape.*560"),
        ({"input_features": torch.zeros(1, 40, 560)}, "do not belong together.*30 frames.*13"),
        ({"input_features": torch.zeros(3, 17, 560)}, "holds 1 items, `input_features` 3"),
        ({"padding_mask": torch.ones(1, 15_000)}, r"`padding_mask` must have the shape \(1, 16000\)"),
        ({"padding_mask": torch.arange(16_000)[None] > 99}, "padding goes on the right"),
        ({"padding_mask": torch.zeros(1, 16_000)}, "empty"),
        ({"num_quantizers": 0}, "at least 1, got 0"),
        ({"merging_threshold": 1.5}, "between -1 and 1, got 1.5"),
        ({"merging_threshold": [0.9, 0.8]}, "one number or one for each of the 1 items"),
        ({"target_frame_rate": 20.0}, "between 1.5625 and 12.5 tokens per second, got 20.0"),
        ({"target_frame_rate": 6.25, "merging_threshold": 0.9}, "not both"),
        ({"merging_threshold": math.nan}, "between -1 and 1, got nan"),
        ({"chunk_length_s": -1.0}, "`chunk_length_s` must be positive"),
        ({"chunk_length_s": math.nan}, "`chunk_length_s` must be positive.*finite.*got nan"),
        ({"chunk_length_s": "30"}, "`chunk_length_s` must be positive.*finite.*got '30'"),
        ({"input_values": torch.zeros(1, 1, 16_000).short()}, "`input_values` must be floats, got torch.int16"),
        ({"input_values": torch.zeros(1, 1, 16_000) * 1j}, "`input_values` must be floats, got torch.complex64"),
        ({"input_values": torch.full((1, 1, 16_000), math.nan)}, "`input_values` must be finite"),
        ({"input_features": torch.zeros(1, 17, 560).long()}, "`input_features` must be floats, got torch.int64"),
        ({"input_features": torch.full((1, 17, 560), math.inf)}, "`input_features` must be finite"),
        ({"padding_mask": torch.full((1, 16_000), math.nan)}, "`padding_mask` must be 1 for the valid part"),
        ({"input_features_mask": torch.arange(17)[None] % 2}, "`input_features_mask` must be 1 for the valid part"),
    ],
)
def test_encode_says_what_is_wrong(codec, device, arguments, message):
    inputs = {"input_values": torch.zeros(1, 1, 16_000), "input_features": torch.zeros(1, 17, 560)} | arguments
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        codec.encode(**inputs)
    if not inputs.keys() & {"chunk_length_s"}:
        with pytest.raises(ValueError, match=message):
            codec(**inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_values": [[0.0] * 16_000]}, "`input_values` must be a torch.Tensor, got list.*return_tensors=.pt"),
        ({"input_features": np.zeros((1, 17, 560))}, "`input_features` must be a torch.Tensor, got ndarray"),
        ({"padding_mask": [[1] * 16_000]}, "`padding_mask` must be a torch.Tensor, got list"),
        ({"merging_threshold": "0.9"}, "`merging_threshold` must be one number.*got str '0.9'"),
        ({"target_frame_rate": 6.25j}, "`target_frame_rate` must be one number.*got complex"),
        ({"num_quantizers": 3.0}, "`num_quantizers` must be an integer, got float 3.0"),
        ({"num_quantizers": True}, "`num_quantizers` must be an integer, got bool"),
        ({"num_quantizers": "3"}, "`num_quantizers` must be an integer, got str"),
    ],
)
def test_encode_says_which_type_is_wrong(codec, device, arguments, message):
    inputs = {"input_values": torch.zeros(1, 1, 16_000), "input_features": torch.zeros(1, 17, 560)} | arguments
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for method in (codec.encode, codec):
        with pytest.raises(TypeError, match=message):
            method(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), torch.tensor(3)])
def test_any_integer_counts_codebooks(codec, golden, device, number):
    inputs = clip(golden, "codec_tiny", device)
    expected = codec.encode(**inputs, num_quantizers=3)
    assert expected.audio_codes.shape[1] == 3
    assert torch.equal(codec.encode(**inputs, num_quantizers=number).audio_codes, expected.audio_codes)
    assert torch.equal(codec(**inputs, num_quantizers=number).audio_codes, expected.audio_codes)


@torch.no_grad()
@pytest.mark.parametrize("optimize", [False, True])
def test_threads_give_the_results_of_one(load, golden, device, optimize):
    codec = copy.deepcopy(load("codec_tiny", device))
    codec = optimize_for_cpu(codec) if optimize else codec
    inputs = [clip(golden, "codec_tiny", device)] + [noise_batch(device, [n])[1] for n in (40_000, 25_000, 9_000)]

    @torch.no_grad()
    def run(i: int) -> tuple[torch.Tensor, ...]:
        encoded = codec.encode(**inputs[i % 4], merging_threshold=0.9)
        return encoded.audio_codes, encoded.token_lengths, encoded.latents, codec.decode(**encoded).audio_values

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(run, range(16))):
            assert all(torch.equal(*pair) for pair in zip(results, expected[i % 4], strict=True))


CODES = torch.zeros(1, 5, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs `audio_codes` or `latents`"),
        ({"audio_codes": CODES[0]}, r"must have the shape \(batch_size, num_quantizers, num_tokens\).*\(5, 4\)"),
        ({"audio_codes": CODES.float()}, "must be integers, got torch.float32"),
        ({"audio_codes": CODES.repeat(1, 2, 1)}, "1 to 5 codebooks.*got 10"),
        ({"audio_codes": CODES + 64}, "between 0 and 63 in an acoustic codebook, got values from 64 to 64"),
        ({"audio_codes": CODES[:, :1] + 32768}, "between 0 and 32767 in the semantic codebook"),
        ({"audio_codes": CODES - 1}, "between 0 and 32767 in the semantic codebook, got values from -1"),
        ({"audio_codes": CODES, "token_lengths": torch.ones(1, 3).long()}, r"`token_lengths`.*\(1, 4\), got \(1, 3\)"),
        ({"audio_codes": CODES, "token_lengths": torch.ones(1, 4)}, "`token_lengths` must be integers"),
        (
            {"audio_codes": CODES, "token_lengths": torch.tensor([[3, -1, 1, 1]])},
            "must be 1 to 8.*got values from -1 to 3",
        ),
        ({"audio_codes": CODES, "token_lengths": torch.tensor([[3, 0, 1, 1]])}, "1 to 8.*got values from 0 to 3"),
        ({"audio_codes": CODES, "token_lengths": torch.tensor([[3, 9, 1, 1]])}, "1 to 8.*got values from 1 to 9"),
        ({"audio_codes": CODES, "num_frames": 9}, "`num_frames` must be 4, .*got 9"),
        ({"audio_codes": CODES, "audio_codes_mask": torch.tensor([[1, 0, 1, 0]])}, "padding goes on the right"),
        ({"audio_codes": CODES, "audio_codes_mask": torch.full((1, 4), math.nan)}, "padding goes on the right"),
        ({"latents": torch.full((1, 32, 4), math.nan)}, "`latents` must be finite"),
        ({"latents": torch.zeros(1, 32, 4).long()}, "`latents` must be floats, got torch.int64"),
        ({"audio_codes": CODES, "audio_codes_mask": torch.zeros(1, 4)}, "an item has no tokens"),
        ({"audio_codes": CODES[..., :0]}, "an item has no tokens"),
    ],
)
def test_decode_says_what_is_wrong(codec, device, arguments, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"audio_codes": CODES.tolist()}, "`audio_codes` must be a torch.Tensor, got list"),
        ({"audio_codes": CODES, "token_lengths": [[1] * 4]}, "`token_lengths` must be a torch.Tensor, got list"),
        ({"audio_codes": CODES, "audio_codes_mask": [[1] * 4]}, "`audio_codes_mask` must be a torch.Tensor, got list"),
    ],
)
def test_decode_says_which_type_is_wrong(load, arguments, message):
    with pytest.raises(TypeError, match=message):
        load("codec_tiny").decode(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsampling_ratios": [2, 2]}, "same product"),
        ({"num_bottleneck_attention_heads": 7}, "`bottleneck_hidden_size`.*7"),
        ({"num_quantizers": 0}, "at least 1"),
        ({"max_frames_per_token": 0}, "at least 1"),
        ({"merging_threshold_range": [1.0, 0.8]}, "lower and an upper"),
    ],
)
def test_config_says_what_is_wrong(options, message):
    with pytest.raises(Exception, match=message):
        FlexiCodecConfig(**options)
