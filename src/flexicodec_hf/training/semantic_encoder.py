"""The semantic encoder as a speech recognizer, which is how it learns what sounds alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig

from ..configuration_flexicodec import FlexiCodecConfig
from ..modeling_flexicodec import FlexiCodecFrameMerger


@dataclass
class SemanticEncoderOutput(CausalLMOutput):
    """
    Args:
        last_hidden_state: `(batch_size, num_features, hidden_size)`, what the logits are made of.
    """

    last_hidden_state: Tensor | None = None


class SemanticEncoderForCTC(PreTrainedModel):
    """
    A SAN-M encoder (arXiv:2006.01713) with a learned query in front, as the codec runs it, and a
    CTC head.

    Args:
        config: Sizes of the encoder; the head has `vocab_size` outputs, of which `pad_token_id` is
            the blank.
    """

    config_class = FunAsrNanoEncoderConfig
    main_input_name = "input_features"
    _supports_sdpa = True

    def __init__(self, config: FunAsrNanoEncoderConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.query_embedding = nn.Embedding(1, config.input_size)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.ctc_head:
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif module is self.query_embedding:
            init.normal_(module.weight, std=0.02)

    def forward(
        self, input_features: Tensor, input_features_mask: Tensor, labels: Tensor | None = None
    ) -> SemanticEncoderOutput:
        """
        Args:
            input_features: `(batch_size, num_features, input_size)`.
            input_features_mask: `(batch_size, num_features)`, 1 for features and 0 for padding.
            labels: `(batch_size, num_labels)`, -100 at padding. An item may have none.

        Returns:
            The logits `(batch_size, num_features, vocab_size)`, the encoder's output, and the CTC
            loss: the mean over items of each item's loss divided by its number of labels, which is
            0 for an item without labels.
        """
        query = self.query_embedding.weight.expand(input_features.shape[0], -1, -1)
        mask = F.pad(input_features_mask, (1, 0), value=1).bool()
        hidden_states = self.encoder(torch.cat([query, input_features], dim=1), mask).last_hidden_state[:, 1:]
        logits = self.ctc_head(hidden_states)
        loss = None
        if labels is not None:
            known = labels != -100
            num_labels = known.sum(dim=1)
            losses = F.ctc_loss(
                logits.float().log_softmax(dim=-1).transpose(0, 1),
                labels.masked_fill(~known, 0),
                input_features_mask.sum(dim=1),
                num_labels,
                blank=self.config.pad_token_id,
                reduction="none",
                zero_infinity=True,
            )
            loss = (losses * (num_labels > 0) / num_labels.clamp(min=1)).mean()
        return SemanticEncoderOutput(loss=loss, logits=logits, last_hidden_state=hidden_states)


def teacher_loss(hidden_states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """
    Mean squared distance of the encoder's output from a teacher's, both `(batch_size, num_features,
    size)`, where `mask` is 1: the mean over items of each item's mean.
    """
    distances = (hidden_states.float() - targets).square().mean(dim=-1)
    return ((distances * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def similarity_spread_loss(hidden_states: Tensor, mask: Tensor, rates: Mapping[float, float]) -> Tensor:
    """
    How far the similarities of neighboring frames are from the spread that lets two merging
    thresholds have the rates asked for.

    With the distance d, one less the similarity, -log d should be distributed as a logistic variable,
    whose width follows from the rates. Its mean is free: `calibrate_similarities` moves it.

    Args:
        hidden_states: The encoder's output `(batch_size, num_features, hidden_size)`.
        mask: `(batch_size, num_features)`, 1 for features and 0 for padding.
        rates: Tokens per second by merging threshold, for two thresholds.
    """
    codec = FlexiCodecConfig()
    num_frames = (mask.sum(dim=1) / codec.semantic_downsampling_factor).long()
    frames = F.interpolate(hidden_states.float().mT, int(num_frames.max()), mode="linear").mT
    distances = 1 - F.cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1)
    positions = torch.arange(distances.shape[1], device=mask.device)
    closeness = -(distances[positions < num_frames[:, None] - 1] + 1e-3).log()
    thresholds, shares = torch.tensor(list(rates)), torch.tensor(list(rates.values())) / codec.frame_rate
    width = float((1 - thresholds).log().diff() / -shares.logit().diff())
    quantiles = (torch.arange(len(closeness), device=mask.device) + 0.5) / len(closeness)
    return (closeness.sort().values - closeness.mean() - width * quantiles.logit()).abs().mean()


@torch.no_grad()
def calibrate_similarities(
    model: SemanticEncoderForCTC, frames: Tensor, num_frames: Tensor, rates: Mapping[float, float]
) -> dict[float, float]:
    """
    Change the encoder's last layer normalization so that two merging thresholds have the rates asked for.

    Each channel is weighted by a power of its deviation: the fewer channels matter, the wider
    similarities spread. The channel that matters least becomes a constant: the larger it is, the
    higher all similarities are. The CTC head is changed to match, so that the model recognizes what it
    did.

    Args:
        model: The trained model, changed in place.
        frames: What its encoder gives for some clips, on codec frames, `(batch_size, num_frames,
            hidden_size)`.
        num_frames: `(batch_size,)`, frames of each clip.
        rates: Tokens per second by merging threshold, for two thresholds.

    Returns:
        The rates that the thresholds have now.
    """
    codec = FlexiCodecConfig()
    merger = FlexiCodecFrameMerger(codec)
    used = torch.cat([clip[:length] for clip, length in zip(frames, num_frames, strict=True)])
    mean, deviation = used.mean(dim=0), used.std(dim=0).clamp(min=1e-4)
    near, far = sorted(rates, reverse=True)

    def weights(power: float) -> tuple[Tensor, int]:
        weight = deviation**power
        spared = int((weight * deviation).argmin())
        weight[spared] = 0
        return weight / (weight * deviation).square().mean().sqrt(), spared

    def rate(weight: Tensor, constant: float, threshold: float) -> float:
        segments = merger(F.pad((frames - mean) * weight, (0, 1), value=constant), num_frames, threshold)
        return float(segments.token_mask.sum() / num_frames.sum() * codec.frame_rate)

    def constant_for(weight: Tensor) -> float:
        return _root(lambda constant: rates[near] - rate(weight, constant, near), 0.0, 10 * len(weight) ** 0.5)

    def excess(power: float) -> float:
        weight, _ = weights(power)
        return rate(weight, constant_for(weight), far) - rates[far]

    weight, spared = weights(_root(excess, -1.0, 4.0))
    constant = constant_for(weight)
    head, norm = model.ctc_head, model.encoder.layers[-1].final_layernorm
    head.bias.add_(head.weight @ mean)
    head.weight.div_(weight.masked_fill(weight == 0, torch.inf))
    norm.bias.copy_((norm.bias - mean) * weight)
    norm.weight.mul_(weight)
    norm.bias[spared] = constant
    return {threshold: rate(weight, constant, threshold) for threshold in (near, far)}


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that rises is 0, by bisection."""
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Pieces of words (byte-pair encoding of letters and apostrophes, in lower case); the padding is
    CTC's blank.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}']+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def best_paths(logits: Tensor, mask: Tensor) -> Tensor:
    """
    The likeliest ids `(batch_size, num_features)` of logits `(batch_size, num_features,
    vocab_size)`; -100 at padding.
    """
    return logits.argmax(dim=-1).masked_fill(mask == 0, -100)


def decode_ctc(tokenizer: PreTrainedTokenizerFast, paths: Tensor) -> list[str]:
    """The words of paths `(batch_size, num_features)`, as `best_paths` gives them."""
    texts = []
    for path in paths:
        pieces = path.unique_consecutive()
        texts.append(tokenizer.decode(pieces[(pieces >= 0) & (pieces != tokenizer.pad_token_id)]))
    return texts
