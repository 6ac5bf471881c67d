"""The steps of the codec and of text to speech as `torch.export` programs: one item, of any length.

What has a size that depends on values stays outside, in the program that runs the graphs (runner.py): frames are
merged into tokens between `semantic_encoder` and `quantizer`, tokens become frames between `dequantizer` and
`decoder`, and the loops over tokens and flow steps are plain loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from ..compatibility_flexicodec import CACHE
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel


@dataclass
class Graph:
    """
    A step to export.

    Args:
        name: Of the file.
        module: Takes the inputs in their order, and returns the outputs.
        inputs: Examples by name.
        lengths: For each input, the dimension that has any length.
        outputs: Names of the outputs.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    lengths: dict[str, int]
    outputs: tuple[str, ...]

    def program(self) -> ExportedProgram:
        """The step as a program of `torch.export`, that takes any lengths."""
        shapes = tuple({self.lengths[name]: Dim.DYNAMIC} if name in self.lengths else None for name in self.inputs)
        for part in self.module.modules():
            # With PyTorch's fused attention, the decomposition for ONNX fails on `view` of its output.
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")
        # Otherwise lengths of 0 and 1 would be taken for something special, and refused.
        oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), oblivious:
            return torch.export.export(self.module.eval(), tuple(self.inputs.values()), dynamic_shapes=shapes)


def codec_graphs(codec: FlexiCodecModel) -> Iterator[Graph]:
    """
    The five steps of the codec.

    | graph | inputs | outputs |
    | --- | --- | --- |
    | `semantic_encoder` | `input_features` `(1, num_features, 560)` | `hidden_states` `(1, num_features, size)` |
    | `acoustic_encoder` | `input_values` `(1, num_frames, hop_length)` | `frames` `(1, num_frames, hidden_size)` |
    | `quantizer` | `semantic_frames`, `acoustic_frames`, `token_lengths` | `audio_codes` |
    | `dequantizer` | `audio_codes` `(1, num_quantizers, num_tokens)`; -1 is no code | `latents` |
    | `decoder` | `frames` `(1, num_frames, hidden_size)` | `audio_values` `(1, num_samples)` |
    """
    config = codec.config
    size, frames, tokens = config.semantic_model_config.hidden_size, 24, 10
    lengths = torch.tensor([[3, 1, 2, 3, 1, 4, 2, 3, 4, 1]])
    yield Graph(
        "semantic_encoder",
        _SemanticEncoder(codec),
        {"input_features": torch.zeros(1, 32, config.semantic_model_config.input_size)},
        {"input_features": 1},
        ("hidden_states",),
    )
    yield Graph(
        "acoustic_encoder",
        _AcousticEncoder(codec),
        {"input_values": torch.zeros(1, frames, config.hop_length)},
        {"input_values": 1},
        ("frames",),
    )
    yield Graph(
        "quantizer",
        _Quantizer(codec),
        {
            "semantic_frames": torch.zeros(1, frames, size),
            "acoustic_frames": torch.zeros(1, frames, config.hidden_size),
            "token_lengths": lengths,
        },
        {
            "semantic_frames": 1,
            "acoustic_frames": 1,
            "token_lengths": 1,
        },
        ("audio_codes",),
    )
    yield Graph(
        "dequantizer",
        _Dequantizer(codec),
        {"audio_codes": torch.zeros(1, config.num_quantizers, tokens, dtype=torch.long)},
        {"audio_codes": 2},
        ("latents",),
    )
    yield Graph(
        "decoder",
        _Decoder(codec),
        {"frames": torch.zeros(1, frames, config.hidden_size)},
        {"frames": 1},
        ("audio_values",),
    )


def tts_graphs(model: FlexiCodecForTextToSpeech) -> Iterator[Graph]:
    """
    The steps of text to speech.

    | graph | inputs | outputs |
    | --- | --- | --- |
    | `ar_text` | `text_ids` `(1, num_text)` | `text_states` `(1, num_text, hidden_size)` |
    | `ar_positions` | `positions` `(num_positions,)`, of which only the number counts | `relative_keys` |
    | `ar_decoder` | `input_ids`, `previous_lengths`, `text_states` (0 where there is no text), `relative_keys`, \
`past_keys`, `past_values` `(num_layers, 1, num_heads, num_past, head_dim)` | `logits`, `duration_logits` of the \
last position, `keys`, `values` |
    | `voicebox` | `codes` `(1, num_frames)`, `is_conditional` `(1,)`, `mel` `(1, num_frames, num_mel_bins)`, \
`timestep` `(1,)` | `velocity` |
    | `vocoder` | `mel` `(1, num_frames, num_mel_bins)` | `audio_values` `(1, num_samples)` |

    `ar_decoder` reads a prompt as well as a single token: the length of the past may be 0. Without a vocoder the
    codec makes the sound: its `decoder`, and its `dequantizer` where there is no Voicebox, belong to the steps then.
    """
    config, length, past = model.config.ar_config, 7, 5
    heads = config.num_attention_heads
    cache = torch.zeros(config.num_hidden_layers, 1, heads, past, config.hidden_size // heads)
    ids = torch.zeros(1, length, dtype=torch.long)
    yield Graph("ar_text", _Text(model.ar), {"text_ids": ids}, {"text_ids": 1}, ("text_states",))
    yield Graph(
        "ar_positions",
        _Positions(model.ar),
        {"positions": torch.arange(length)},
        {"positions": 0},
        ("relative_keys",),
    )
    yield Graph(
        "ar_decoder",
        _Decoding(model.ar),
        {
            "input_ids": ids,
            "previous_lengths": ids.clone(),  # one tensor for both would become one input
            "text_states": torch.zeros(1, length, config.hidden_size),
            "relative_keys": torch.zeros(config.num_hidden_layers, heads, 16, config.hidden_size // heads),
            "past_keys": cache,
            "past_values": cache.clone(),
        },
        dict.fromkeys(("input_ids", "previous_lengths", "text_states"), 1)
        | {"relative_keys": 2}
        | dict.fromkeys(("past_keys", "past_values"), 3),
        ("logits", "duration_logits", "keys", "values"),
    )
    if model.voicebox is not None:
        num_bins = model.voicebox.config.num_mel_bins
        yield Graph(
            "voicebox",
            _Velocity(model.voicebox),
            {
                "codes": ids,
                "is_conditional": torch.ones(1),
                "mel": torch.zeros(1, length, num_bins),
                "timestep": torch.zeros(1),
            },
            {"codes": 1, "mel": 1},
            ("velocity",),
        )
    if model.vocoder is None:
        codec = {graph.name: graph for graph in codec_graphs(model.codec)}
        if model.voicebox is None:
            yield codec["dequantizer"]
        yield codec["decoder"]
    else:
        yield Graph(
            "vocoder",
            _Vocoder(model.vocoder),
            {"mel": torch.zeros(1, length, model.vocoder.config.num_mel_bins)},
            {"mel": 1},
            ("audio_values",),
        )


class _SemanticEncoder(nn.Module):
    def __init__(self, codec: FlexiCodecModel):
        super().__init__()
        self.encoder = codec.semantic_encoder
        ids = torch.tensor(codec.config.semantic_query_ids)
        self.queries: Tensor = nn.Buffer(codec.semantic_query_embedding(ids).detach()[None])

    def forward(self, input_features: Tensor) -> Tensor:
        features = torch.cat([self.queries, input_features], dim=1)
        mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        return self.encoder(features, mask).last_hidden_state[:, self.queries.shape[1] :]


class _AcousticEncoder(nn.Module):
    def __init__(self, codec: FlexiCodecModel):
        super().__init__()
        self.encoder = codec.acoustic_encoder

    def forward(self, input_values: Tensor) -> Tensor:
        return self.encoder(input_values.flatten(1)[:, None]).transpose(1, 2)


class _Quantizer(nn.Module):
    def __init__(self, codec: FlexiCodecModel):
        super().__init__()
        self.semantic_aggregator, self.acoustic_aggregator = codec.semantic_aggregator, codec.acoustic_aggregator
        self.semantic_quantizer, self.acoustic_quantizer = codec.semantic_quantizer, codec.acoustic_quantizer

    def forward(self, semantic_frames: Tensor, acoustic_frames: Tensor, token_lengths: Tensor) -> Tensor:
        semantic = self.semantic_aggregator(semantic_frames, token_lengths, None, None)
        latents, semantic_codes = self.semantic_quantizer(semantic, None)
        acoustic = self.acoustic_aggregator(acoustic_frames, token_lengths, None, None)
        _, acoustic_codes, _, _ = self.acoustic_quantizer(
            acoustic - latents, len(self.acoustic_quantizer.quantizers), None
        )
        return torch.cat([semantic_codes[:, None], acoustic_codes], dim=1)


class _Dequantizer(nn.Module):
    def __init__(self, codec: FlexiCodecModel):
        super().__init__()
        self.semantic_quantizer, self.acoustic_quantizer = codec.semantic_quantizer, codec.acoustic_quantizer

    def forward(self, audio_codes: Tensor) -> Tensor:
        latents = self.semantic_quantizer.from_codes(audio_codes[:, 0], None)
        for index, quantizer in enumerate(self.acoustic_quantizer.quantizers, start=1):
            codes = audio_codes[:, index]
            vectors = quantizer.out_proj(quantizer.codebook(codes.clamp(min=0)))  # type: ignore[operator, union-attr]
            latents = latents + vectors * (codes >= 0)[..., None]
        return latents


class _Decoder(nn.Module):
    def __init__(self, codec: FlexiCodecModel):
        super().__init__()
        self.bottleneck, self.decoder = codec.bottleneck, codec.acoustic_decoder

    def forward(self, frames: Tensor) -> Tensor:
        return self.decoder(self.bottleneck(frames).transpose(1, 2))[:, 0]


class _Text(nn.Module):
    def __init__(self, ar: FlexiCodecARForConditionalGeneration):
        super().__init__()
        self.encoder, self.projection = ar.model.text_encoder, ar.model.text_projection

    def forward(self, text_ids: Tensor) -> Tensor:
        return self.projection(self.encoder(text_ids))


class _Positions(nn.Module):
    def __init__(self, ar: FlexiCodecARForConditionalGeneration):
        super().__init__()
        self.decoder = ar.model.decoder

    def forward(self, positions: Tensor) -> Tensor:
        return self.decoder.relative_keys(positions.shape[0])


class _Decoding(nn.Module):
    def __init__(self, ar: FlexiCodecARForConditionalGeneration):
        super().__init__()
        self.ar = ar

    def forward(
        self,
        input_ids: Tensor,
        previous_lengths: Tensor,
        text_states: Tensor,
        relative_keys: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
    ) -> tuple[Tensor, ...]:
        model, config = self.ar.model, self.ar.config
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            cache.update(past_keys[layer], past_values[layer], layer)
        # A first column: the length of the token before each.
        embeds = model._embed(input_ids, nn.functional.pad(previous_lengths, (0, 1)), encode_text=False)
        embeds = torch.where((input_ids >= config.text_token_offset)[..., None], text_states, embeds)
        hidden_states = model.decoder(embeds, relative_keys=relative_keys, **{CACHE: cache})[:, -1]
        keys, values = (torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
        return self.ar.lm_head(hidden_states), self.ar.duration_head(hidden_states), keys, values


class _Velocity(nn.Module):
    def __init__(self, voicebox: FlexiCodecVoiceboxModel):
        super().__init__()
        self.voicebox = voicebox

    def forward(self, codes: Tensor, is_conditional: Tensor, mel: Tensor, timestep: Tensor) -> Tensor:
        condition = self.voicebox.code_embedding(codes) * is_conditional
        mask = torch.ones_like(codes, dtype=torch.bool)
        return self.voicebox._velocity(mel, condition, timestep, mask)[0]


class _Vocoder(nn.Module):
    def __init__(self, vocoder: FlexiCodecVocoderModel):
        super().__init__()
        self.vocoder = vocoder

    def forward(self, mel: Tensor) -> Tensor:
        return self.vocoder(mel).audio_values[:, 0]
