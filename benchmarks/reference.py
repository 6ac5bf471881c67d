"""The PyPI package `flexicodec==0.1.2` as a yardstick: its own models, at any size, with seeded random weights.

Importing this module makes that package importable next to a current transformers, in one process with ours, so that
both can be timed and compared on the same weights. Import it before transformers (see `benchmarks/README.md`): the
environment's torchaudio would otherwise fail to load. Nothing here computes anything: each function builds one of the
reference's modules or calls it.

    import reference
    codec = reference.build_codec(reference.codec_config(), reference.SENSEVOICE_FULL, seed=0)
    encoded = reference.encode(codec, audio, num_quantizers=8, merging_threshold=0.91)
    audio = reference.decode(codec, encoded)
"""

import contextlib
import importlib
import importlib.util
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import yaml
from torch import nn


VERSION = "0.1.2"

SENSEVOICE_FULL: dict[str, Any] = {
    "input_size": 560,
    "vocab_size": 25055,
    "encoder_conf": {
        "output_size": 512,
        "attention_heads": 4,
        "linear_units": 2048,
        "num_blocks": 50,
        "tp_blocks": 20,
        "dropout_rate": 0.1,
        "positional_dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "input_layer": "pe",
        "pos_enc_class": "SinusoidalPositionEncoder",
        "normalize_before": True,
        "kernel_size": 11,
        "sanm_shfit": 0,  # spelled so in the reference
        "selfattention_layer_type": "sanm",
    },
}
AR_FULL: dict[str, Any] = {
    "text_encoder_input_size": 1024,
    "llm_input_size": 1024,
    "llm_output_size": 1024,
    "llm_attention_heads": 8,
    "llm_num_blocks": 16,
    "flex_framerate": True,
    "flex_framerate_options": [0.86, 0.91],
}
VOICEBOX_FULL: dict[str, Any] = {
    "mel_dim": 128,
    "hidden_size": 1024,
    "num_layers": 16,
    "num_heads": 16,
    "cond_codebook_size": 32768,
    "cond_dim": 1024,
    "cond_scale_factor": 4,
    "time_scheduler": "cos",
}
VOCOS_FULL: dict[str, Any] = {
    "input_channels": 128,
    "dim": 1024,
    "intermediate_dim": 4096,
    "num_layers": 30,
    "n_fft": 1920,
    "hop_size": 480,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what the reference prints on construction and on inference."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _stub(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def install_shims() -> None:
    """Stand in for what the reference imports but does not need, and load the part of it that needs transformers 4.

    - torchaudio's compiled extension: it wants CUDA libraries, while filter banks and resampling are plain torch.
    - audiotools: only its `BaseModel` is used, as an `nn.Module`.
    - cached_path: called at import, to download a vocoder that is not used here.
    - `LlamaConfig`: the Voicebox passes it positional arguments and reads attributes that transformers 5 took away.
    """
    if importlib.util.find_spec("flexicodec") is None:
        raise ModuleNotFoundError(
            f"the reference package flexicodec=={VERSION} is not installed in this environment ({sys.prefix}); "
            "benchmarks/README.md says how to make one that has it",
            name="flexicodec",
        )
    _stub(
        "torchaudio._extension",
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _IS_RIR_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=lambda function: function,
        fail_if_no_rir=lambda function: function,
    )
    _stub("audiotools", AudioSignal=object, ml=_stub("audiotools.ml", BaseModel=nn.Module))
    _stub("cached_path", cached_path=lambda *_, **__: None)

    transformers = importlib.import_module("transformers")

    class LlamaConfig4(transformers.LlamaConfig):
        model_type = "llama"
        rope_theta = 10000.0
        rope_scaling = None
        pretraining_tp = 1
        use_return_dict = True

        def __init__(self, *sizes: int, **kwargs: Any):
            names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            super().__init__(bos_token_id=None, eos_token_id=None, **dict(zip(names, sizes, strict=False)), **kwargs)

    missing: dict[str, dict[str, Any]] = {
        "transformers.pytorch_utils": {"ALL_LAYERNORM_LAYERS": []},
        "transformers.utils": {
            "is_flash_attn_2_available": lambda: False,
            "is_flash_attn_greater_or_equal_2_10": lambda: False,
        },
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(mock.patch.object(transformers, "LlamaConfig", LlamaConfig4))
        for name, attributes in missing.items():
            module = importlib.import_module(name)
            for key, value in attributes.items():
                if not hasattr(module, key):
                    stack.enter_context(mock.patch.object(module, key, value, create=True))
        importlib.import_module("flexicodec.nar_tts.llama_nar")
        importlib.import_module("flexicodec.modeling_flexicodec")
        importlib.import_module("flexicodec.infer")


@torch.no_grad()
def randomize_(module: nn.Module, seed: int) -> nn.Module:
    """Overwrite every parameter, in the order of `named_parameters`, with random values that keep signals near one.

    A fresh model would hide mistakes: its biases are zero, its norms one and its layer scales nearly nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        return mean + std * torch.randn(parameter.shape, generator=generator)

    for prefix, owner in module.named_modules():
        is_norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            if name == "weight_g":  # small, for the residual units of the codec add up
                stride = owner.stride[0] if isinstance(owner, nn.ConvTranspose1d) else 2
                value = normal(parameter, 0.6, 0.1) * math.sqrt(stride / 2)  # two of the kernel's taps meet an output
            elif name == "weight_v" or isinstance(owner, nn.Embedding):
                value = normal(parameter, 0.0, 1.0)
            elif name in ("scale", "gamma"):
                value = normal(parameter, 0.5, 0.1)
            elif name == "alpha":
                value = normal(parameter, 1.0, 0.15)
            elif prefix.endswith("to_weight"):  # the scale of an adaptive norm
                value = (
                    normal(parameter, 1.0, 0.2)
                    if name == "bias"
                    else normal(parameter, 0.0, 0.5 / math.sqrt(parameter.shape[1]))
                )
            elif is_norm and name == "weight":
                value = normal(parameter, 1.0, 0.2)
            elif name in ("query_embedding", "pos_bias_u", "pos_bias_v"):
                value = normal(parameter, 0.0, 0.5)
            elif parameter.ndim == 1:
                value = normal(parameter, 0.0, 0.2)
            else:
                value = normal(parameter, 0.0, 1 / math.sqrt(parameter[0].numel()))
            parameter.copy_(value)
    return module


def _finish(module: nn.Module, seed: int | None) -> nn.Module:
    return (module if seed is None else randomize_(module, seed)).eval()


def codec_config() -> dict[str, Any]:
    """Arguments of the released codec, from the YAML that the reference package carries."""
    spec = importlib.util.find_spec("flexicodec")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "conf", "model_config.yaml")
    return yaml.safe_load(path.read_text())["model"]


def build_sensevoice(conf: dict[str, Any], seed: int | None = None) -> nn.Module:
    """The semantic encoder; `conf` like `SENSEVOICE_FULL`."""
    model = importlib.import_module("flexicodec.customized_sensevoice.model")
    return _finish(model.SenseVoiceSmall(encoder="SenseVoiceEncoderSmall", length_normalized_loss=True, **conf), seed)


def build_codec(config: dict[str, Any], sensevoice_conf: dict[str, Any], seed: int | None = None) -> nn.Module:
    """The codec, `FlexiCodec(**config)`, with a semantic encoder of any size instead of a downloaded one."""
    module = importlib.import_module("flexicodec.modeling_flexicodec")
    width = sensevoice_conf["encoder_conf"]["output_size"]
    with (
        quiet(),
        mock.patch.object(module, "AutoModel", lambda **_: SimpleNamespace(model=build_sensevoice(sensevoice_conf))),
    ):
        codec = module.FlexiCodec(**config)
        if width != codec.ssl_dim:  # fixed at 512 in the constructor, so what depends on it is made anew
            codec.ssl_dim = width
            codec.convnext_encoder[0] = module.WNConv1d(width, codec.convnext_encoder[0].out_channels, kernel_size=1)
            codec.semantic_aggregator = module.QueryTokenAggregator(
                dim=config["agg_transformer_dim"],
                in_out_dim=width,
                num_heads=config["agg_transformer_num_heads"],
                num_layers=config["agg_transformer_num_layers"],
                dim_feedforward=config["agg_transformer_dim_feedforward"],
                causal=False,
                use_mean_pooling_init=True,
                context_frames=config["transformer_context_frames"],
            )
    return _finish(codec, seed)


def build_fbank() -> Any:
    """The feature extractor, without the random dither that makes the reference's features differ between calls."""
    extractor = importlib.import_module("flexicodec.feature_extractors").FBankGen(sr=16000)
    extractor.frontend.dither = 0.0
    return extractor


def encode(
    codec: nn.Module,
    audio: torch.Tensor,
    sampling_rate: int = 16000,
    num_quantizers: int = 8,
    merging_threshold: float = 0.91,
    audio_lens: torch.Tensor | None = None,
    extractor: Any = None,
) -> dict[str, torch.Tensor]:
    """Audio `(batch, samples)` to `semantic_codes`, `acoustic_codes`, `token_lengths`, `sim_matrix`, `total_frames`.

    Features are computed within; a benchmark makes the `extractor` (`build_fbank`) beforehand.
    """
    model = {"model": codec, "feature_extractor": extractor or build_fbank(), "type": "sensevoice"}
    function = importlib.import_module("flexicodec.infer").encode_flexicodec
    return function(audio, model, sampling_rate, num_quantizers, merging_threshold, audio_lens)


@torch.no_grad()
def decode(codec: nn.Module, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `encode` returned to audio `(batch, 1, samples)`."""
    return codec.decode_from_codes(encoded["semantic_codes"], encoded["acoustic_codes"], encoded["token_lengths"])


def build_ar(config: dict[str, Any], seed: int | None = None) -> nn.Module:
    """The autoregressive model, text to semantic tokens and durations; `config` like `AR_FULL`."""
    module = importlib.import_module("flexicodec.ar_tts.modeling_artts")
    return _finish(module.create_transformer_lm_from_config(**config), seed)


def generate_ar(
    ar: nn.Module,
    text_ids: torch.Tensor,
    max_new_tokens: int,
    framerate: float | None = None,
    prompt_codes: torch.Tensor | None = None,
    prompt_durations: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Greedy decoding of `text_ids` `(1, text_length)` after a prompt, both `(1, prompt_length)`, if there is one.

    `speech_tokens` `(1, n)`, at most `max_new_tokens`, and `duration_classes`, one fewer when that limit ended it.
    """
    empty = torch.zeros(1, 0, dtype=torch.long, device=text_ids.device)
    prompt_codes = empty if prompt_codes is None else prompt_codes
    with quiet():
        return ar.inference(
            text=text_ids,
            text_len=torch.tensor([text_ids.shape[1]], device=text_ids.device),
            prompt_text=None,
            prompt_text_len=None,
            prompt_speech_token=prompt_codes,
            prompt_speech_token_len=prompt_codes.shape[1],
            prompt_token_lengths=prompt_durations,
            embedding=None,
            top_k=1,
            duration_top_k=1,
            min_token_text_ratio=0,
            max_token_text_ratio=(max_new_tokens + 0.5) / text_ids.shape[1],  # the product is rounded down
            inference_framerate=framerate,
        )


def build_voicebox(config: dict[str, Any], seed: int | None = None) -> nn.Module:
    """The flow-matching model, semantic codes and a prompt to mel; `config` like `VOICEBOX_FULL`."""
    return _finish(importlib.import_module("flexicodec.nar_tts.voicebox_models").VoiceBox(**config), seed)


def reverse_diffusion(
    voicebox: nn.Module, cond: torch.Tensor, prompt: torch.Tensor | None, noise: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """`voicebox.reverse_diffusion(cond, prompt, **kwargs)` started from `noise` `(batch, target_frames, mel_dim)`.

    `cond` is `(batch, prompt_frames + target_frames, hidden_size)`: `voicebox.cond_emb` of the codes, repeated up
    to the frame rate of the mel.
    """
    with mock.patch.object(torch, "randn", lambda *_, **__: noise), torch.no_grad():
        return voicebox.reverse_diffusion(cond, prompt, **kwargs)


def build_vocos(config: dict[str, Any], seed: int | None = None) -> nn.Module:
    """The vocoder, mel `(batch, mel_dim, frames)` to audio `(batch, 1, samples)`; `config` like `VOCOS_FULL`."""
    return _finish(importlib.import_module("flexicodec.nar_tts.vocoder_model").Vocos(**config), seed)


def mel_50hz(audio: torch.Tensor) -> torch.Tensor:
    """Audio `(batch, samples)` at 24 kHz to the normalized mel `(batch, 128, samples // 480)`."""
    module = importlib.import_module("flexicodec.nar_tts.voicebox_models")
    return module.extract_normalized_mel_spec_50hz(audio, device=str(audio.device))


install_shims()
