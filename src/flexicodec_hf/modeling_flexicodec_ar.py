"""
The autoregressive text-to-speech model of FlexiCodec (arXiv 2510.00981): text in, semantic tokens with durations out.

A causal text encoder and a causal language model, both with the relative attention of Transformer-XL (arXiv
1901.02860). Text, control and speech ids are one stream (see [`FlexiCodecARConfig`]); how many codec frames each
speech token lasts is carried beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .compatibility_flexicodec import CACHE, takes_cache
from .configuration_flexicodec_ar import FlexiCodecARConfig, FlexiCodecARTextEncoderConfig
from .generation_flexicodec_ar import FlexiCodecARGenerationMixin
from .linear_flexicodec import FlexiCodecLinear


IGNORE_INDEX = -100


@dataclass
class FlexiCodecAROutput(CausalLMOutputWithPast):
    """
    Output of [`FlexiCodecARForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            `token_loss` plus `duration_loss`.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token: the semantic codes and end of speech.
        duration_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, num_durations)`):
            Scores of the duration, in codec frames, of the speech token at the same position.
        cache (`Cache`, *optional*, returned when `use_cache=True`):
            Keys and values of the language model; `past_key_values` before transformers 5.24.
        token_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Mean cross-entropy of the tokens in `labels`.
        duration_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `duration_labels` is given):
            Mean focal loss of the durations in `duration_labels`.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*):
            Of the language model's blocks, as usual.
    """

    duration_logits: Tensor | None = None
    token_loss: Tensor | None = None
    duration_loss: Tensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    bias = create_position_bias_mask(position_bias, attention_mask, query.shape[2] > 1, query, key)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class FlexiCodecARAttention(nn.Module):
    """
    Causal self-attention with relative positions: `((q + u) k^T + (q + v) r^T) / sqrt(head_dim)`, where `r` projects
    the sinusoids of the distance from key to query (arXiv 1901.02860, section 3.3). The first term is left to the
    attention function, the second is its additive mask.
    """

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        # One matrix for all three: a step has few rows, and is as fast as its weights are read.
        self.qkv_proj = FlexiCodecLinear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = FlexiCodecLinear(config.hidden_size, config.hidden_size)
        self.relative_k_proj = FlexiCodecLinear(config.hidden_size, config.hidden_size, bias=False)
        self.content_bias = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim))
        self.position_bias = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim))

    def relative_keys(self, sinusoids: Tensor) -> Tensor:
        """Sinusoids of the distances, of shape `(length, hidden_size)`, to keys `(num_heads, length, head_dim)`."""
        return self._split_heads(self.relative_k_proj(sinusoids)[None])[0]

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        relative_keys: Tensor,
        distances: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = map(self._split_heads, self.qkv_proj(hidden_states).chunk(3, dim=-1))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            # For one query, SDPA's kernel takes twice the time of the two products on CPU, in bfloat16 four times.
            attention = eager_attention_forward
        output, weights = attention(
            self,
            query + self.content_bias,
            key,
            value,
            attention_mask,
            position_bias=self._position_scores(query + self.position_bias, relative_keys, distances),
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def _position_scores(self, query: Tensor, relative_keys: Tensor, distances: Tensor) -> Tensor:
        # One product per head for all rows of the batch, which share the relative keys; then each pair of positions
        # takes the score of its distance. All kept keys take part: bfloat16 on CPU would copy a slice of them first.
        batch_size, num_heads, length, head_dim = query.shape
        rows = (query * self.scaling).transpose(0, 1).reshape(num_heads, batch_size * length, head_dim)
        scores = torch.matmul(relative_keys, rows.transpose(1, 2))
        scores = scores.view(num_heads, -1, batch_size, length).permute(2, 0, 3, 1)
        return scores.gather(-1, distances.expand(batch_size, num_heads, -1, -1))

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class FlexiCodecARLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = FlexiCodecARAttention(config, layer_idx)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = FlexiCodecLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = FlexiCodecLinear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, relative_keys: Tensor, distances: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), relative_keys, distances, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.dropout(self.activation(self.fc1(self.mlp_norm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(expanded))


class FlexiCodecARTransformer(nn.Module):
    """Causal transformer with relative positions: the body of the text encoder and of the language model."""

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(FlexiCodecARLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self._relative_keys: Tensor | None = None
        self._relative_keys_source: list[tuple[int, int, int]] = []

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        relative_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        length = inputs_embeds.shape[1]
        offset: int | Tensor = 0
        key_length = length
        if cache is not None:
            offset = cache.get_seq_length()
            key_length, _ = cache.get_mask_sizes(length, 0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE: cache},
        )
        if relative_keys is None:
            relative_keys = self.relative_keys(key_length)
        positions = torch.arange(key_length, device=inputs_embeds.device)
        # Keys after the query have no distance; the mask hides them.
        distances = ((positions[:length] + offset)[:, None] - positions).clamp(min=0)

        hidden_states = self.dropout(inputs_embeds * math.sqrt(self.config.hidden_size))
        for layer, keys in zip(self.layers, relative_keys, strict=True):
            hidden_states = layer(
                hidden_states,
                keys,
                distances,
                attention_mask=mask,
                **{CACHE: cache},
                **kwargs,
            )
        return self.norm(hidden_states)

    def relative_keys(self, length: int) -> Tensor:
        """
        The projected relative positions of all layers, of shape `(num_layers, num_heads, n, head_dim)`, `n >= length`;
        index `d` along `n` is a key `d` positions before the query.

        They depend on the weights alone, so inference keeps them, until the weights change or [`~nn.Module.train`] is
        called (a change through `weight.data` cannot be noticed).
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._project_positions(length)
        weights = [attention.relative_k_proj.weight for attention in self._attentions()]
        source = [(id(weight), weight.data_ptr(), _version(weight)) for weight in weights]
        kept = self._relative_keys
        if kept is None or kept.shape[2] < length or self._relative_keys_source != source:
            # In multiples, so that a growing sequence needs few projections.
            kept = self._project_positions(256 * math.ceil(length / 256))
            self._relative_keys, self._relative_keys_source = kept, source
        return kept

    def train(self, mode: bool = True) -> "FlexiCodecARTransformer":
        self._relative_keys = None
        return super().train(mode)

    def _project_positions(self, length: int) -> Tensor:
        weight = self.norm.weight
        width = self.config.hidden_size
        # In float32 whatever the model's dtype: positions beyond 256 are not whole numbers in bfloat16.
        frequencies = torch.exp(
            torch.arange(0, width, 2, device=weight.device, dtype=torch.float32) * (-math.log(10000.0) / width)
        )
        angles = torch.arange(length, device=weight.device, dtype=torch.float32)[:, None] * frequencies
        sinusoids = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(weight.dtype)
        sinusoids = self.dropout(sinusoids)
        return torch.stack([attention.relative_keys(sinusoids) for attention in self._attentions()])

    def _attentions(self) -> list[FlexiCodecARAttention]:
        return [layer.get_submodule("self_attn") for layer in self.layers]  # type: ignore[misc]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class FlexiCodecARPreTrainedModel(PreTrainedModel):
    config: FlexiCodecARConfig
    config_class = FlexiCodecARConfig
    base_model_prefix = "model"
    input_modalities = ("text", "audio")
    supports_gradient_checkpointing = True
    _no_split_modules = ("FlexiCodecARLayer",)
    _skip_keys_device_placement = (CACHE,)
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(FlexiCodecARLayer, layer_name="decoder"),
        "attentions": OutputRecorder(FlexiCodecARAttention, index=1, layer_name="decoder"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiCodecARAttention):
            init.xavier_uniform_(module.content_bias)
            init.xavier_uniform_(module.position_bias)


class FlexiCodecARTextEncoder(FlexiCodecARPreTrainedModel):
    """The causal text encoder."""

    config: FlexiCodecARTextEncoderConfig
    config_class = FlexiCodecARTextEncoderConfig

    def __init__(self, config: FlexiCodecARTextEncoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = FlexiCodecARTransformer(config)
        self.post_init()

    def forward(self, text_ids: Tensor) -> Tensor:
        """Text ids of shape `(batch_size, text_length)` to states `(batch_size, text_length, hidden_size)`."""
        return self.transformer(self.embed_tokens(text_ids))


class FlexiCodecARModel(FlexiCodecARPreTrainedModel):
    """The text encoder and the language model, without heads."""

    def __init__(self, config: FlexiCodecARConfig):
        super().__init__(config)
        self.text_encoder = FlexiCodecARTextEncoder._from_config(config.text_encoder_config)
        self.text_projection = FlexiCodecLinear(config.text_encoder_config.hidden_size, config.hidden_size)
        self.speech_embedding = nn.Embedding(config.speech_vocab_size, config.hidden_size)
        self.duration_embedding = nn.Embedding(config.num_durations + 1, config.hidden_size)
        self.control_embedding = nn.Embedding(config.text_token_offset - config.speech_vocab_size, config.hidden_size)
        self.decoder = FlexiCodecARTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.speech_embedding

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        encode_text: bool = True,
        relative_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The stream of ids (see [`FlexiCodecARConfig`]), padded on the left or, in training, on the right.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Durations of the speech tokens in codec frames, anything at or below 0 elsewhere. A token's input
                carries the duration of the token before it; with a cache, an extra first column gives that of the
                last cached token. All 0 when left out, right for a stream with at most one speech token.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for ids, 0 for padding.
            cache (`Cache`, *optional*):
                Keys and values of the stream so far; also taken as `past_key_values`.
            use_cache (`bool`, *optional*):
                Whether to return `cache`.
            encode_text (`bool`, *optional*, defaults to `True`):
                Whether `input_ids` may hold text. Generation turns it off after the prompt, so that the text encoder
                does not run again.
            relative_keys (`torch.Tensor` of shape `(num_layers, num_heads, n, head_dim)`, *optional*):
                [`FlexiCodecARTransformer.relative_keys`] of the decoder, for a compiled step that cannot keep them.
        """
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.decoder(
            self._embed(input_ids, token_lengths, encode_text),
            attention_mask=attention_mask,
            cache=cache,
            relative_keys=relative_keys,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache if use_cache else None})

    def _embed(self, input_ids: Tensor, token_lengths: Tensor | None, encode_text: bool) -> Tensor:
        num_codes = self.config.speech_vocab_size
        length = input_ids.shape[1]
        if token_lengths is None:
            token_lengths = torch.zeros_like(input_ids)
        previous = F.pad(token_lengths, (1 + length - token_lengths.shape[1], 0))[:, :length].clamp(min=0)
        speech = self.speech_embedding(input_ids.clamp(max=num_codes - 1)) + self.duration_embedding(previous)
        control = self.control_embedding((input_ids - num_codes).clamp(0, self.control_embedding.num_embeddings - 1))
        embeds = torch.where((input_ids < num_codes)[..., None], speech, control)
        return self._put_text(embeds, input_ids) if encode_text else embeds

    def _put_text(self, embeds: Tensor, input_ids: Tensor) -> Tensor:
        # The encoder sees each row's text alone, moved to the left: it is causal, so what follows needs no mask.
        is_text = input_ids >= self.config.text_token_offset
        text_length = int(is_text.sum(dim=1).max())
        if text_length == 0:
            return embeds
        columns = is_text.int().argsort(dim=1, descending=True, stable=True)[:, :text_length]
        text_ids = (input_ids.gather(1, columns) - self.config.text_token_offset).clamp(min=0)
        states = self.text_projection(self.text_encoder(text_ids))
        source = (is_text.cumsum(dim=1) - 1).clamp(min=0)
        text = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
        return torch.where(is_text[..., None], text, embeds)


class FlexiCodecARForConditionalGeneration(FlexiCodecARPreTrainedModel, FlexiCodecARGenerationMixin):
    """
    FlexiCodec's autoregressive text-to-speech model: [`FlexiCodecARModel`] with a head for the next semantic token and
    one for the duration of the current token.

    Example:

    ```python
    >>> inputs = model.build_inputs(text_ids, codes=prompt_codes, token_lengths=prompt_lengths, merging_threshold=0.91)
    >>> output = model.generate(**inputs, return_dict_in_generate=True)
    >>> output.sequences, output.token_lengths  # the whole stream, and the frames of each speech token in it
    ```
    """

    # The losses are means over the tokens of each batch: Trainer divides them among accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: FlexiCodecARConfig):
        super().__init__(config)
        self.model = FlexiCodecARModel(config)
        self.lm_head = FlexiCodecLinear(config.hidden_size, config.vocab_size)
        self.duration_head = FlexiCodecLinear(config.hidden_size, config.num_durations)
        self.post_init()
        self.generation_config = self.default_generation_config(config)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        duration_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        encode_text: bool = True,
        relative_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> FlexiCodecAROutput:
        """
        Args:
            input_ids, token_lengths, attention_mask, cache, use_cache, encode_text, relative_keys:
                As in [`FlexiCodecARModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` where they are speech or end of speech, -100 elsewhere. They are shifted inside: the output
                before a token predicts it.
            duration_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Durations of the speech tokens in frames, -100 elsewhere: a token's own output predicts its duration.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute the logits of the last so many positions (0: all), or of the positions given.
        """
        outputs = self.model(
            input_ids=input_ids,
            token_lengths=token_lengths,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            encode_text=encode_text,
            relative_keys=relative_keys,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(hidden_states)
        duration_logits = self.duration_head(hidden_states)

        token_loss = self._token_loss(logits, labels) if labels is not None else None
        duration_loss = self._duration_loss(duration_logits, duration_labels) if duration_labels is not None else None
        losses = [loss for loss in (token_loss, duration_loss) if loss is not None]
        loss = torch.stack(losses).sum() if losses else None
        return FlexiCodecAROutput(
            loss=loss,
            logits=logits,
            duration_logits=duration_logits,
            token_loss=token_loss,
            duration_loss=duration_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.config.label_smoothing,
        )

    def _duration_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Focal loss (arXiv 1708.02002): most tokens last a frame or two; the focus is on those that are missed."""
        labels = labels.flatten()
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 1).float(), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        missed = (1 - torch.exp(-cross_entropy)) ** self.config.focal_gamma
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
        return self.config.focal_alpha * (missed * cross_entropy).sum() / count

    def build_inputs(
        self,
        text_ids: Tensor,
        text_attention_mask: Tensor | None = None,
        codes: Tensor | None = None,
        token_lengths: Tensor | None = None,
        codes_mask: Tensor | None = None,
        merging_threshold: float | list[float] | Tensor | None = None,
        return_labels: bool = False,
    ) -> dict[str, Tensor]:
        """
        Lay text and speech out as the model's stream, padded on the left.

        Args:
            text_ids (`torch.LongTensor` of shape `(batch_size, text_length)`):
                The tokenizer's ids: language token, then the text (of the voice prompt too, if there is one).
            text_attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                1 for text, 0 for padding, on either side.
            codes (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Semantic codes: of the voice prompt, or of the whole utterance in training.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Durations of `codes` in frames; required with them.
            codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for codes, 0 for padding, on either side.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                The codec's merging threshold (and so the frame rate) to speak at, one of `config.merging_thresholds`, for
                all items or for each.
            return_labels (`bool`, *optional*, defaults to `False`):
                For training: end `codes` with end of speech, and return `labels` and `duration_labels`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `token_lengths`, `attention_mask` and, when asked for, `labels` and
            `duration_labels`, each of shape `(batch_size, sequence_length)`.

        Raises:
            ValueError: An id, a duration or the threshold is out of range, or codes come without durations.
        """
        config = self.config
        num_text_ids = config.input_vocab_size - config.text_token_offset
        _check_range("text_ids", text_ids, text_attention_mask, 0, num_text_ids - 1)
        if (codes is None) != (token_lengths is None):
            raise ValueError("codes and token_lengths belong together: give both, or neither.")
        if codes is None or token_lengths is None:
            if return_labels:
                raise ValueError("return_labels=True needs codes and token_lengths: they are what is learnt.")
            codes = token_lengths = text_ids.new_zeros(text_ids.shape[0], 0)
        if codes.shape != token_lengths.shape or codes.shape[0] != text_ids.shape[0]:
            raise ValueError(
                f"codes {tuple(codes.shape)} and token_lengths {tuple(token_lengths.shape)} must have one shape, with "
                f"text_ids' batch size {text_ids.shape[0]}."
            )
        _check_range("codes", codes, codes_mask, 0, config.speech_vocab_size - 1)
        highest = config.num_durations - 1 if return_labels else config.num_durations
        _check_range("token_lengths", token_lengths, codes_mask, 0, highest)

        if isinstance(merging_threshold, Tensor):
            merging_threshold = merging_threshold.tolist()
        thresholds = merging_threshold if isinstance(merging_threshold, list) else [merging_threshold] * len(text_ids)
        if len(thresholds) != len(text_ids):
            raise ValueError(
                f"merging_threshold holds {len(thresholds)} values for {len(text_ids)} texts: pass one, or one for each."
            )
        threshold_ids = text_ids.new_tensor([[config.threshold_token_id(threshold)] for threshold in thresholds])

        def control(token_id: int) -> Tensor:
            return text_ids.new_full((text_ids.shape[0], 1), token_id)

        text_mask = torch.ones_like(text_ids) if text_attention_mask is None else text_attention_mask.to(text_ids)
        speech_mask = torch.ones_like(codes) if codes_mask is None else codes_mask.to(text_ids)
        one, empty = control(1), control(0)[:, :0]
        end, end_mask = (control(config.end_token_id), one) if return_labels else (empty, empty)
        head = [control(config.start_token_id), threshold_ids]
        ids = torch.cat([*head, text_ids + config.text_token_offset, control(config.task_token_id), codes, end], dim=1)
        mask = torch.cat([one, one, text_mask, one, speech_mask, end_mask], dim=1)
        lengths = F.pad(token_lengths, (ids.shape[1] - codes.shape[1] - end.shape[1], end.shape[1]))

        # A stable sort moves all padding to the left and keeps the order of the rest.
        order = mask.argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        ids = ids.gather(1, order).masked_fill(mask == 0, config.pad_token_id)
        lengths = lengths.gather(1, order).masked_fill(mask == 0, 0)
        inputs = {"input_ids": ids, "token_lengths": lengths, "attention_mask": mask}
        if return_labels:
            inputs["labels"] = ids.masked_fill(ids > config.end_token_id, IGNORE_INDEX)
            inputs["duration_labels"] = lengths.masked_fill(ids >= config.speech_vocab_size, IGNORE_INDEX)
        return inputs


def _check_range(name: str, values: Tensor, mask: Tensor | None, lowest: int, highest: int) -> None:
    outside = (values < lowest) | (values > highest)
    if mask is not None:
        outside &= mask.bool()
    if outside.any():
        raise ValueError(f"{name} must lie in {lowest} ... {highest}, got {values[outside][0].item()}.")


__all__ = [
    "FlexiCodecARForConditionalGeneration",
    "FlexiCodecARModel",
    "FlexiCodecAROutput",
    "FlexiCodecARPreTrainedModel",
]
