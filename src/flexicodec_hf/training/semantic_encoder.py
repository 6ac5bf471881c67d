"""The semantic encoder as a speech recognizer, which is how it learns what sounds alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig


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
    ) -> CausalLMOutput:
        """
        Args:
            input_features: `(batch_size, num_features, input_size)`.
            input_features_mask: `(batch_size, num_features)`, 1 for features and 0 for padding.
            labels: `(batch_size, num_labels)`, -100 at padding.

        Returns:
            The logits `(batch_size, num_features, vocab_size)`, and the CTC loss: the mean over
            items of each item's loss divided by its number of labels.
        """
        query = self.query_embedding.weight.expand(input_features.shape[0], -1, -1)
        mask = F.pad(input_features_mask, (1, 0), value=1).bool()
        hidden_states = self.encoder(torch.cat([query, input_features], dim=1), mask).last_hidden_state[:, 1:]
        logits = self.ctc_head(hidden_states)
        loss = None
        if labels is not None:
            known = labels != -100
            loss = F.ctc_loss(
                logits.float().log_softmax(dim=-1).transpose(0, 1),
                labels.masked_fill(~known, 0),
                input_features_mask.sum(dim=1),
                known.sum(dim=1),
                blank=self.config.pad_token_id,
                zero_infinity=True,
            )
        return CausalLMOutput(loss=loss, logits=logits)


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


__all__ = ["SemanticEncoderForCTC", "best_paths", "decode_ctc", "train_tokenizer"]
