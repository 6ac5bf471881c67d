"""
The autoregressive text-to-speech model of FlexiCodec (arXiv 2510.00981): text in, semantic tokens
with durations out.

A causal text encoder and a causal language model, both with the relative attention of
Transformer-XL (arXiv 1901.02860). Text, control and speech ids form one stream (see
[`FlexiCodecARConfig`]). A second tensor beside it, `token_lengths`, gives the codec frames that
each speech token lasts: the input of a token holds the duration of the token before it, and its
output scores its own (flexicodec 0.1.2, ar_tts/modeling_artts.py, lines 346 to 362).
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
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .compatibility_flexicodec import CACHE, OffloadedDeviceMixin, takes_cache
from .configuration_flexicodec_ar import FlexiCodecARConfig, FlexiCodecARTextEncoderConfig
from .generation_flexicodec_ar import FlexiCodecARGenerationMixin


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
            Those of the language model: `(batch_size, sequence_length, hidden_size)` for the
            embeddings and each block, and `(batch_size, num_attention_heads, sequence_length,
            key_length)` for each block.
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
    Causal self-attention with relative positions: `((q + u) k^T + (q + v) r^T) / sqrt(head_dim)`,
    where `r` projects the sinusoids of the distance from query to key (arXiv 1901.02860, section
    3.3). The attention function computes the first term, and the second is its additive mask.
    """

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        # One matrix for all three: a step of generation has few rows and takes as long as reading
        # its weights.
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.relative_k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.content_bias = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim))
        self.position_bias = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim))

    def relative_keys(self, sinusoids: Tensor) -> Tensor:
        """
        Sinusoids of the distances, of shape `(length, hidden_size)`, to keys `(num_heads, length,
        head_dim)`.
        """
        return self._split_heads(self.relative_k_proj(sinusoids)[None])[0]

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        relative_keys: Tensor,
        distances: Tensor | None,
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
        # For a single query on a CPU, SDPA's kernel takes twice as long as the two products, in
        # bfloat16 four times.
        # TODO: drop once PyTorch's kernel for one query is as fast as the products.
        if attention is sdpa_attention_forward and query.shape[2] == 1 and query.device.type == "cpu":
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

    def _position_scores(self, query: Tensor, relative_keys: Tensor, distances: Tensor | None) -> Tensor:
        # One product per head for all rows of the batch, which share the relative keys. Then each
        # pair of positions takes the score of its distance. Keys beyond the longest distance take
        # part too: on a CPU, a slice of bfloat16 keys would be copied first.
        batch_size, num_heads, length, head_dim = query.shape
        rows = (query * self.scaling).transpose(0, 1).reshape(num_heads, batch_size * length, head_dim)
        if distances is None:
            relative_keys = relative_keys[:, :length].flip(1)
        scores = torch.matmul(relative_keys, rows.transpose(1, 2))
        scores = scores.view(num_heads, -1, batch_size, length).permute(2, 0, 3, 1)
        if distances is not None:
            return scores.gather(-1, distances.expand(batch_size, num_heads, -1, -1))
        # From the largest distance to 0. With a column more, each row of the matrix begins one
        # distance earlier in the same memory, read as rows of `length`.
        shifted = F.pad(scores, (0, 1)).flatten(2)[..., length - 1 :]
        return shifted[..., : length * length].unflatten(2, (length, length))

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class FlexiCodecARLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = FlexiCodecARAttention(config, layer_idx)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, relative_keys: Tensor, distances: Tensor | None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), relative_keys, distances, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.dropout(self.activation(self.fc1(self.mlp_norm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(expanded))


class FlexiCodecARTransformer(nn.Module):
    """
    Causal transformer with relative positions: the body of the text encoder and of the language
    model.
    """

    def __init__(self, config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(FlexiCodecARLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

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
        # A whole mask is taken as it is. Otherwise transformers looks for padding in it, and each token
        # waits for the device.
        is_whole = attention_mask is not None and tuple(attention_mask.shape[1:]) == (key_length,)
        if is_whole and length == 1 and inputs_embeds.device.type != "cpu":
            attention_mask = attention_mask[:, None, None].bool()  # type: ignore[index]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE: cache},
        )
        if relative_keys is None:
            relative_keys = self.relative_keys(key_length, inputs_embeds.device)
        # The gradient of distances that are looked up would be a scatter, which is slow.
        distances = None
        if not (torch.is_grad_enabled() and key_length == length):
            positions = torch.arange(key_length, device=inputs_embeds.device)
            # Keys after the query have no distance; the mask hides them.
            distances = ((positions[:length] + offset)[:, None] - positions).clamp(min=0)
        return self.run_layers(inputs_embeds, relative_keys, distances, mask, cache, **kwargs)

    def run_layers(
        self,
        inputs_embeds: Tensor,
        relative_keys: Tensor,
        distances: Tensor | None,
        mask: Tensor | None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        The layers alone, when it is known who attends to whom.

        Args:
            inputs_embeds: `(batch_size, length, hidden_size)`.
            relative_keys: `(num_layers, num_heads, n, head_dim)`, see `relative_keys`.
            distances: From each query to each key, `(length, key_length)`, or of each item `(batch_size,
                1, length, key_length)`; below `n`. `None` for whole sequences.
            mask: `(batch_size, 1, length, key_length)`, `True` where a query attends.
            cache: Its `update(key, value, layer_index)` gives all keys and values.

        Returns:
            `(batch_size, length, hidden_size)`.
        """
        # The reference scales the embeddings: flexicodec 0.1.2,
        # ar_tts/utils/transformer/embedding.py, line 218.
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

    def relative_keys(self, length: int, device: torch.device | None = None) -> Tensor:
        """
        Project the relative positions for all layers. They depend only on the weights, so a loop
        over single steps computes them once and passes them to `forward`, as `generate` does.

        Args:
            length (`int`): Positions from the first key to the last query.
            device (`torch.device`, *optional*):
                Where the input of `forward` is. Defaults to the device of the weights, which are
                nowhere while they are offloaded.

        Returns:
            `torch.FloatTensor` of shape `(num_layers, num_heads, length, head_dim)`; index `d` of
            the third dimension belongs to a key `d` positions before the query.
        """
        device, width = device or self.norm.weight.device, self.config.hidden_size
        # Always in float32: positions above 256 are not whole numbers in bfloat16. Sine and cosine
        # alternate, as in the reference: flexicodec 0.1.2, ar_tts/utils/transformer/embedding.py,
        # lines 238 to 245.
        frequencies = torch.exp(
            torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width)
        )
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
        sinusoids = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        sinusoids = self.dropout(sinusoids.to(self.norm.weight.dtype))
        return torch.stack([layer.self_attn.relative_keys(sinusoids) for layer in self.layers])  # type: ignore[operator, union-attr]


class FlexiCodecARPreTrainedModel(OffloadedDeviceMixin, PreTrainedModel):
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
        """
        Text ids of shape `(batch_size, text_length)` to states `(batch_size, text_length,
        hidden_size)`.
        """
        return self.transformer(self.embed_tokens(text_ids))


class FlexiCodecARModel(FlexiCodecARPreTrainedModel):
    """The text encoder and the language model, without heads."""

    def __init__(self, config: FlexiCodecARConfig):
        super().__init__(config)
        self.text_encoder = FlexiCodecARTextEncoder._from_config(config.text_encoder_config)
        self.text_projection = nn.Linear(config.text_encoder_config.hidden_size, config.hidden_size)
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
                The stream of ids (see [`FlexiCodecARConfig`]), padded on the left, or in training
                on either side.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Codec frames of the speech tokens, 0 elsewhere. With a cache, an extra first column
                holds the duration of the last token in the cache. If left out, all are 0, which is
                right for at most one speech token.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for ids, 0 for padding.
            cache (`Cache`, *optional*):
                Keys and values of the stream so far; also taken as `past_key_values`.
            use_cache (`bool`, *optional*):
                Whether to return `cache`.
            encode_text (`bool`, *optional*, defaults to `True`):
                Whether `input_ids` may hold text. Generation turns this off after the prompt, since
                finding text waits for the device.
            relative_keys (`torch.Tensor` of shape `(num_layers, num_heads, n, head_dim)`, *optional*):
                `model.decoder.relative_keys(n)` with `n` no less than the length of the stream so
                far. Computed anew when left out, which costs a step of generation as much as the
                step itself.
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
        # The duration of the token before each position; 0 before the first.
        previous = F.pad(token_lengths, (1 + length - token_lengths.shape[1], 0))[:, :length].clamp(min=0)
        speech = self.speech_embedding(input_ids.clamp(max=num_codes - 1)) + self.duration_embedding(previous)
        control = self.control_embedding((input_ids - num_codes).clamp(0, self.control_embedding.num_embeddings - 1))
        embeds = torch.where((input_ids < num_codes)[..., None], speech, control)
        return self._put_text(embeds, input_ids) if encode_text else embeds

    def _put_text(self, embeds: Tensor, input_ids: Tensor) -> Tensor:
        # The encoder gets each row's text moved to the left. It is causal, so the padding after it
        # needs no mask.
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
    FlexiCodec's autoregressive text-to-speech model: [`FlexiCodecARModel`] with a head for the next
    semantic token and one for the duration of the current token.

    Example:

    ```python
    >>> inputs = model.build_inputs(text_ids, codes=prompt_codes, token_lengths=prompt_lengths, merging_threshold=0.91)
    >>> output = model.generate(**inputs, return_dict_in_generate=True)
    >>> output.sequences, output.token_lengths  # the whole stream, and the frames of each speech token in it
    ```
    """

    # The losses are means over the tokens of a batch, so `Trainer` itself averages over
    # accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: FlexiCodecARConfig):
        super().__init__(config)
        self.model = FlexiCodecARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.duration_head = nn.Linear(config.hidden_size, config.num_durations)
        self.generation_config = self.default_generation_config(config)
        self.post_init()

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
                See [`FlexiCodecARModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` where they are speech or end of speech, -100 elsewhere. The model shifts
                them: the output before a token predicts it.
            duration_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Codec frames of the speech tokens, -100 elsewhere. They are not shifted: a token's
                own output predicts its duration.
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                What each output predicts, -100 where nothing counts: `labels` that are shifted
                already, used instead of them. Sequence parallelism passes these.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last positions to compute logits for (0 for all), or the positions
                themselves.
        """
        # Not an argument: `Trainer` evaluates only batches that hold all arguments named `labels`.
        shift_labels = kwargs.pop("shift_labels", None)
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

        targets = shift_labels
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        token_loss = self._token_loss(logits, targets) if targets is not None else None
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

    def _token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.config.label_smoothing,
        )

    def _duration_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """
        Focal loss (arXiv 1708.02002), which favors rare durations: most tokens last only one or two
        frames. As in the reference: flexicodec 0.1.2, ar_tts/modeling_artts.py, lines 25 to 33.
        """
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
                The tokenizer's ids: language token, then the text (of the voice prompt too, if
                there is one).
            text_attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                1 for text, 0 for padding, which may be on either side.
            codes (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Semantic codes of the voice prompt, or in training of the whole utterance.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Codec frames that each of `codes` lasts, required with `codes`.
            codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for codes, 0 for padding, which may be on either side.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                The codec's merging threshold, which sets the frame rate to speak at: one of
                `config.merging_thresholds`, for all items or for each.
            return_labels (`bool`, *optional*, defaults to `False`):
                For training: end `codes` with end of speech, and return `labels` and
                `duration_labels`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `token_lengths` and `attention_mask`, and with
            `return_labels` also `labels` and `duration_labels`, each of shape `(batch_size,
            sequence_length)`.

        Raises:
            ValueError: An id, a duration or the threshold is out of range, or `codes` and
                `token_lengths` do not match.
        """
        config = self.config
        if codes is None and token_lengths is None and not return_labels:
            codes = token_lengths = text_ids.new_zeros(len(text_ids), 0)
        if codes is None or token_lengths is None:
            raise ValueError(
                "`codes` and `token_lengths` belong together: pass both, or neither. `return_labels=True` needs both."
            )
        if codes.shape != token_lengths.shape or len(codes) != len(text_ids):
            raise ValueError(
                f"`codes` {tuple(codes.shape)} and `token_lengths` {tuple(token_lengths.shape)} must have one shape, "
                f"with the batch size of `text_ids`, {len(text_ids)}."
            )
        _check_range("text_ids", text_ids, text_attention_mask, config.text_encoder_config.vocab_size - 1)
        _check_range("codes", codes, codes_mask, config.speech_vocab_size - 1)
        # The embedding has a row more than the head has classes.
        _check_range("token_lengths", token_lengths, codes_mask, config.num_durations - int(return_labels))

        one = text_ids.new_ones(len(text_ids), 1)
        text_mask = torch.ones_like(text_ids) if text_attention_mask is None else text_attention_mask.to(text_ids)
        speech_mask = torch.ones_like(codes) if codes_mask is None else codes_mask.to(text_ids)
        ids_and_masks = [
            (one * config.start_token_id, one),
            (self._threshold_ids(merging_threshold, text_ids), one),
            (text_ids + config.text_token_offset, text_mask),
            (one * config.task_token_id, one),
            (codes, speech_mask),
        ]
        if return_labels:
            ids_and_masks.append((one * config.end_token_id, one))
        ids, mask = (torch.cat(parts, dim=1) for parts in zip(*ids_and_masks, strict=True))
        num_after = int(return_labels)
        lengths = F.pad(token_lengths, (ids.shape[1] - codes.shape[1] - num_after, num_after))

        # A stable sort moves all padding to the left and keeps the order of the rest.
        order = mask.argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        ids = ids.gather(1, order).masked_fill(mask == 0, config.padding_token_id)
        lengths = lengths.gather(1, order).masked_fill(mask == 0, 0)
        inputs = {"input_ids": ids, "token_lengths": lengths, "attention_mask": mask}
        if return_labels:
            inputs["labels"] = ids.masked_fill(ids > config.end_token_id, IGNORE_INDEX)
            inputs["duration_labels"] = lengths.masked_fill(ids >= config.speech_vocab_size, IGNORE_INDEX)
        return inputs

    def _threshold_ids(self, merging_threshold: float | list[float] | Tensor | None, text_ids: Tensor) -> Tensor:
        if isinstance(merging_threshold, Tensor):
            merging_threshold = merging_threshold.tolist()
        thresholds = merging_threshold if isinstance(merging_threshold, list) else [merging_threshold] * len(text_ids)
        if len(thresholds) != len(text_ids):
            raise ValueError(
                f"`merging_threshold` holds {len(thresholds)} values for {len(text_ids)} texts: pass one, or one "
                "for each."
            )
        return text_ids.new_tensor([[self.config.threshold_token_id(threshold)] for threshold in thresholds])


def _check_range(name: str, values: Tensor, mask: Tensor | None, highest: int) -> None:
    outside = (values < 0) | (values > highest)
    if mask is not None:
        outside &= mask.bool()
    if outside.any():
        raise ValueError(f"`{name}` must lie between 0 and {highest}, got {values[outside][0].item()}.")


__all__ = [
    "FlexiCodecARForConditionalGeneration",
    "FlexiCodecARModel",
    "FlexiCodecAROutput",
    "FlexiCodecARPreTrainedModel",
]
