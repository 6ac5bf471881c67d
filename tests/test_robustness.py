"""Values that nobody would mean: each is refused in words that name it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForTextToWaveform, AutoProcessor

from conftest import byte_tokenizer
from flexicodec_hf import (
    FlexiCodecARConfig,
    FlexiCodecConfig,
    FlexiCodecFeatureExtractor,
    FlexiCodecTTSConfig,
    FlexiCodecTTSProcessor,
    FlexiCodecVocoderConfig,
    FlexiCodecVoice,
    FlexiCodecVoiceboxConfig,
)
from flexicodec_hf.audio_flexicodec import AudioError, AudioWriter, resample, write_audio
from flexicodec_hf.generation_flexicodec_tts import _check_settings, _join_texts, _row_generators
from flexicodec_hf.modeling_flexicodec import FlexiCodecFramesOutput
from flexicodec_hf.repository_flexicodec_tts import check_voice_name


@pytest.mark.parametrize(
    "file, entry, value, message",
    [
        ("config.json", "codebook_size", 99, "its weights do not have the sizes of its configuration"),
        ("generation_config.json", "pad_token_id", [0], "a configuration has a wrong entry .*TypeError"),
        ("tokenizer_config.json", "tokenizer_class", True, "a configuration has a wrong entry .*AttributeError"),
    ],
)
def test_repositories_whose_files_do_not_fit(tts_repository, tmp_path, file, entry, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(tts_repository, copy)
    path = copy / ("tts" if file.startswith("generation") else "") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    auto = {"config.json": AutoModel, "generation_config.json": AutoModelForTextToWaveform}.get(file, AutoProcessor)
    with pytest.raises(ValueError, match=f"{re.escape(str(copy))} cannot be loaded: {message}"):
        auto.from_pretrained(copy)


@pytest.fixture
def codec(codec_dir):
    return AutoModel.from_pretrained(codec_dir()).eval()


@pytest.mark.parametrize(
    "config_class, options, message",
    [
        (FlexiCodecConfig, {"bottleneck_intermediate_size": -1}, "bottleneck_intermediate_size"),
        (FlexiCodecConfig, {"aggregator_hidden_size": 10**12}, "aggregator_hidden_size"),
        (FlexiCodecConfig, {"semantic_model_config": {"fsmn_kernel_size": -(10**9)}}, r"fsmn_kernel_size` must be"),
        (FlexiCodecConfig, {"semantic_model_config": {"intermediate_size": 10**30}}, r"intermediate_size` must be"),
        (FlexiCodecConfig, {"semantic_model_config": {"hidden_dropout": math.nan}}, r"hidden_dropout` must be"),
        (FlexiCodecConfig, {"semantic_model_config": {"layer_norm_eps": -0.5}}, r"layer_norm_eps` must be"),
        (FlexiCodecConfig, {"semantic_model_config": {"model_type": -1}}, "`semantic_model_config` has a wrong"),
        (FlexiCodecConfig, {"semantic_model_config": {"id2label": ["a"]}}, "`semantic_model_config` has a wrong"),
        (FlexiCodecARConfig, {"text_encoder_config": 0}, "`text_encoder_config` must be a dictionary"),
        (FlexiCodecTTSConfig, {"codec_config": "x"}, "`codec_config` must be a dictionary"),
        (FlexiCodecTTSConfig, {"voices": None}, "`voices` must be a list"),
        (FlexiCodecConfig, {"dtype": ""}, "FlexiCodecConfig has a wrong entry: .*torch"),
        (FlexiCodecConfig, {"torch_dtype": "x"}, "FlexiCodecConfig has a wrong entry: .*'x'"),
        (FlexiCodecARConfig, {"dtype": math.inf}, "`dtype` must be a type of PyTorch, .* got inf"),
        (FlexiCodecVoiceboxConfig, {"dtype": []}, r"`dtype` must be a type of PyTorch, .* got \[\]"),
        (FlexiCodecVocoderConfig, {"dtype": "nn"}, "`dtype` must be a type of PyTorch, .* got <module"),
        (FlexiCodecTTSConfig, {"dtype": {}}, "`dtype` must be a type of PyTorch, .* got {}"),
        (FlexiCodecTTSConfig, {"ar_config": {"id2label": [0]}}, "FlexiCodecARConfig has a wrong entry: .*items"),
        (FlexiCodecARConfig, {"output_hidden_states": 1.5}, "`output_hidden_states` must be true or false, got 1.5"),
        (FlexiCodecConfig, {"semantic_model_config": {"dtype": [-1, 2]}}, r"`dtype` must be .* got \[-1, 2\]"),
        (FlexiCodecConfig, {"semantic_model_config": {"output_attentions": {}}}, "`output_attentions` must be true"),
        (FlexiCodecConfig, {"max_frames_per_token": 10**30}, "`max_frames_per_token` must be at least 1 and at most"),
        (FlexiCodecConfig, {"num_quantizers": 10**6}, "`num_quantizers` counts .* at most 1000, got 1000000"),
    ],
)
def test_configurations_out_of_range(config_class, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config_class(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"audio": torch.zeros(9).to_sparse()}, "dense tensor"),
        ({"audio": torch.zeros(9, device="meta")}, "dense tensor"),
        ({"audio": np.ma.array(np.zeros(9), mask=[True] * 9)}, "masked samples"),
        ({"device": "nowhere"}, "`device` must be one"),
        ({"device": "meta"}, "`device` must be one"),
        ({"max_length": math.inf}, "`max_length` must be"),
        ({"max_length": "9"}, "`max_length` must be"),
        ({"pad_to_multiple_of": 10**12}, r"`pad_to_multiple_of` must be .* below 2\*\*31"),
        ({"pad_to_multiple_of": 1.5}, "`pad_to_multiple_of` must be"),
        ({"sampling_rate": np.array([16_000, 16_000])}, "`sampling_rate` is"),
    ],
)
def test_inputs_of_the_feature_extractor(codec_dir, options, message):
    extractor = AutoFeatureExtractor.from_pretrained(codec_dir())
    with pytest.raises(ValueError, match=message):
        extractor(**{"audio": np.zeros(900, dtype=np.float32), "sampling_rate": 16_000} | options)


def test_inputs_of_encode_and_decode(codec, codec_dir):
    extractor = AutoFeatureExtractor.from_pretrained(codec_dir())
    inputs = extractor(np.full(16_000, 0.1, dtype=np.float32), sampling_rate=16_000, return_tensors="pt")
    for options, message in (
        ({"input_values": inputs.input_values * 32768}, r"in \[-1, 1\], as PCM"),
        ({"input_values": inputs.input_values.to_sparse()}, "dense tensor"),
        ({"input_features": inputs.input_features.to("meta")}, "dense tensor"),
        ({"padding_mask": inputs.padding_mask.to(torch.complex64)}, "`padding_mask` must be real"),
        ({"num_quantizers": torch.tensor([3])}, "`num_quantizers` must be an integer"),
        ({"merging_threshold": torch.tensor(0.7, device="meta")}, "`merging_threshold` must be one number"),
        ({"chunk_length_s": 10**400}, "`chunk_length_s` must be positive"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            codec.encode(**{**inputs, **options})
    with pytest.raises(ValueError, match="`latents` must have"):
        codec.decode(latents=torch.zeros(1, 3, 5))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": torch.tensor([9])}, "`num_frames` must be 1 to 4, the number of frames, got values from 9"),
        ({"num_frames": torch.tensor([0])}, "`num_frames` must be 1 to 4"),
        ({"num_frames": torch.tensor([4.0])}, r"`frames\.num_frames` must be integers"),
        ({"num_frames": torch.tensor([4, 4])}, r"`frames\.num_frames` must be integers of the shape"),
        ({"num_frames": None}, r"`frames\.num_frames` must be a torch\.Tensor"),
        ({"semantic_frames": torch.full((1, 4, 32), math.nan)}, "semantic frames must be finite"),
        ({"semantic_frames": np.zeros((1, 4, 32))}, r"`frames\.semantic_frames` must be a torch\.Tensor"),
        ({"semantic_frames": torch.ones(1, 4, 31)}, r"`frames` must have semantic frames .*got \(1, 4, 31\)"),
        ({"acoustic_frames": torch.ones(1, 3, 32)}, r"and acoustic ones .*\(1, 3, 32\)"),
    ],
)
def test_frames_that_are_not_those_of_encode_frames(codec, changes, message):
    sizes = codec.config.semantic_model_config.hidden_size, codec.config.hidden_size
    frames = FlexiCodecFramesOutput(torch.randn(1, 4, sizes[0]), torch.randn(1, 4, sizes[1]), torch.tensor([4]))
    codec.quantize_frames(frames)
    if torch.is_tensor(semantic := changes.get("semantic_frames")) and semantic.isnan().all():
        changes = {"semantic_frames": frames.semantic_frames * math.nan}
    with pytest.raises((ValueError, TypeError), match=message):
        codec.quantize_frames(frames._replace(**changes))
    with pytest.raises(TypeError, match="must be the output of `encode_frames`, got tuple"):
        codec.quantize_frames(tuple(frames))


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 2.5),
        ("min_new_tokens", -1),
        ("num_return_sequences", 0),
        ("temperature", math.inf),
        ("top_p", 2),
        ("top_p", "x"),
        ("duration_temperature", math.nan),
        ("max_token_text_ratio", math.nan),
        ("num_inference_steps", 2.5),
        ("guidance_scale", math.nan),
        ("guidance_rescale", 1.5),
    ],
)
def test_settings_of_speech(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        _check_settings({name: value})


def test_texts():
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    for input_ids, attention_mask, message in (
        (ids.float(), mask, "`input_ids` must be integers"),
        (ids.bool(), mask, "`input_ids` must be integers"),
        (ids[:0], mask[:0], "`input_ids` must be integers"),
        (ids, mask[:, :4], "mask of `input_ids`"),
        (ids, mask[0], "mask of `input_ids`"),
        (ids, mask[:1], "mask of `input_ids`"),
    ):
        with pytest.raises(ValueError, match=message):
            _join_texts(input_ids, attention_mask, None, None, None)


@pytest.fixture(scope="module")
def processor():
    return FlexiCodecTTSProcessor(FlexiCodecFeatureExtractor(), byte_tokenizer())


SPEECH = np.sin(np.arange(16_000) / 9, dtype=np.float32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"text": "a\ud800b"}, r"`text` holds half of a surrogate pair.*'a\\ud800b'"),
        ({"text": "a\ud800b", "language": "zh"}, "`text` holds half of a surrogate pair"),
        ({"audio": SPEECH, "sampling_rate": 16_000, "reference_text": "\udc80"}, "`reference_text` must be what"),
        ({"text": "<|audio|>"}, r"`text` holds <\|audio\|>, which means a recording"),
        ({"text": ["Hello.", "a<|audio|>b"]}, r"`text` holds <\|audio\|>"),
        ({"text": "a<|audio|>b", "audio": SPEECH, "sampling_rate": 16_000, "reference_text": "c"}, "given twice"),
        ({"audio": SPEECH, "sampling_rate": 1}, "`source_rate` must be a number of hertz from 1000"),
        ({"audio": "http://127.0.0.1:9/x.wav"}, r"http://127\.0\.0\.1:9/x\.wav: cannot be downloaded"),
    ],
)
def test_inputs_of_the_processor(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)


@pytest.mark.parametrize("name, value", [("feature_extractor", [1]), ("language", ["en"]), ("mel_config", [0])])
def test_settings_of_the_processor(processor, tmp_path, name, value):
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(settings | {name: value}))
    with pytest.raises(ValueError, match=f"`{name}`.* must be a"):
        FlexiCodecTTSProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("seed", ["x", math.nan, 10**30, [1, None]])
def test_seeds(seed):
    with pytest.raises(ValueError, match="`seed` must be a whole number"):
        _row_generators(1, seed, None)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "", "a\nb", "x" * 300, 5, None])
def test_names_of_voices_are_no_paths(name):
    with pytest.raises(ValueError, match="name of a voice"):
        check_voice_name(name)


def test_voices_with_a_damaged_header(tmp_path):
    codes = torch.tensor([1, 2, 3])
    FlexiCodecVoice({0.5: (codes, codes)}).save(tmp_path / "voice.safetensors")
    with safe_open(tmp_path / "voice.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    deep, unknown = tmp_path / "deep.safetensors", tmp_path / "unknown.safetensors"
    save_file(tensors, deep, metadata=metadata | {"voice": "[" * 100_000})
    save_file({name.replace("0.5", "nan"): tensor for name, tensor in tensors.items()}, unknown, metadata=metadata)
    assert json.loads(metadata.get("voice", "{}")) == {}
    for path, message in ((deep, "damaged voice"), (unknown, "merging threshold of the voice is nan")):
        with pytest.raises(ValueError, match=message):
            FlexiCodecVoice.load(path)


def test_rates_and_audio_files(tmp_path):
    with pytest.raises(AudioError, match=r"`target_rate` must be a number of hertz from .*, got '16000'"):
        resample(np.zeros(9, dtype=np.float32), 8_000, "16000")
    with pytest.raises(AudioError, match="`sampling_rate` must be a number of hertz"):
        write_audio(tmp_path / "a.wav", np.zeros(9, dtype=np.float32), 0)
    with pytest.raises(OSError, match="the voice cannot be written"):
        FlexiCodecVoice({0.5: (torch.tensor([1]), torch.tensor([1]))}).save(tmp_path / "none" / "a.safetensors")
    with pytest.raises(AudioError, match="cannot be written"), AudioWriter(tmp_path / "none" / "a.wav") as writer:
        writer.write(np.zeros(9, dtype=np.float32), 16_000)
