"""The text tokenizer: Whisper's multilingual BPE with 99 languages, as a fast tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import cached_file

from .checkpoint import CheckpointError


DEFAULT_SOURCE = "openai/whisper-tiny"
"""Every multilingual `openai/whisper-*` has this vocabulary; this is the smallest repository."""

_BPE_SIZE = 50257
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in list(LANGUAGES)[:99]),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nocaptions|>",
    "<|notimestamps|>",
    *(f"<|{0.02 * step:.2f}|>" for step in range(1501)),
)
_PROBE = "ðə tu~ words, 你好!"
_PROBE_IDS = [23436, 7250, 2604, 93, 2283, 11, 10930, 2131, 0]


def build_tokenizer(source: str | Path = DEFAULT_SOURCE) -> PreTrainedTokenizerFast:
    """Whisper's multilingual tokenizer as FlexiCodec-TTS uses it; `save_pretrained` it for `AutoTokenizer`.

    Ids 0..50256 are the BPE, 50257 `<|endoftext|>`, 50259 + i the i-th of 99 languages, 51864 the
    last timestamp. Encoding a text gives `<|en|>` and the text; special tokens spelt out in it are
    read as plain characters. Only the BPE of the source is used, which all multilingual Whisper
    models share: from a large-v3 one, whose 100th language (`yue`) shifts the ids of all special
    tokens after it, comes the same table of 99.

    Args:
        source: A Whisper repository on the Hub, a directory with its `tokenizer.json`, or that file.

    Raises:
        OSError: The repository or the files cannot be found.
        CheckpointError: The files do not hold Whisper's multilingual BPE.
    """
    vocabulary, merges = _read_bpe(source)
    # The empty token, which no text contains, is the last id of the BPE.
    vocabulary = {token: index for token, index in vocabulary.items() if index < _BPE_SIZE} | {"": _BPE_SIZE - 1}
    # The published merges lack the very first one, so that " t" never becomes one token and, for example, " two" gets
    # other ids than from OpenAI's own tokenizer, with which FlexiCodec-TTS was trained.
    if ("Ġ", "t") not in merges:
        merges.insert(0, ("Ġ", "t"))
    mismatch = CheckpointError(
        f"{source} does not hold the multilingual vocabulary of Whisper. Use the tokenizer of a multilingual model, "
        f"such as {DEFAULT_SOURCE}; English-only models (`openai/whisper-*.en`) have another."
    )
    try:
        backend = Tokenizer(BPE(vocabulary, merges))
    except Exception as error:  # tokenizers has no narrower class
        raise mismatch from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if sorted(vocabulary.values()) != list(range(_BPE_SIZE)) or backend.encode(_PROBE).ids != _PROBE_IDS:
        raise mismatch
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="<|en|> $A", special_tokens=[("<|en|>", backend.token_to_id("<|en|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def _read_bpe(source: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, as they stand in the files."""
    tokenizer_file = Path(source if Path(source).is_file() else cached_file(str(source), "tokenizer.json"))
    try:
        model = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]
        if model["type"] != "BPE":
            raise ValueError(f"it holds {model['type']!r}")
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        return dict(model["vocab"]), merges
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{tokenizer_file} must be a tokenizer.json that holds a BPE: {error}.") from error
