"""
Train the autoregressive text-to-speech model: from text to the semantic tokens of a codec and their
durations.

accelerate launch examples/train_ar.py --codec flexicodec --dataset my_speech --output_dir ar --do_eval \
    --per_device_train_batch_size 16 --learning_rate 1e-4 --warmup_steps 1000 --max_steps 100000 --bf16 \
    --eval_strategy steps --eval_steps 1000 --save_steps 1000 --report_to tensorboard
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer
from transformers.utils import logging

from flexicodec_hf import FlexiCodecARConfig, FlexiCodecARForConditionalGeneration, FlexiCodecModel
from flexicodec_hf.text_flexicodec import encode_text, prepare_text
from flexicodec_hf.training.batches import load_splits
from flexicodec_hf.training.trainer import (
    SpeechSamples,
    SpeechTrainingArguments,
    override_config,
    parse_arguments,
    run_training,
)
from flexicodec_hf.training.tts import (
    ARBatches,
    SpeechCollator,
    SpeechEncoder,
    TTSDataArguments,
    TTSTrainer,
    cache_splits,
    train_text_tokenizer,
)


logger = logging.get_logger("transformers.train_ar")

# Texts that a tokenizer is trained on at most.
NUM_TOKENIZER_TEXTS = 100_000


@dataclass
class ModelArguments:
    """The model, the codec whose tokens it learns, and the text it reads."""

    codec: str = field(metadata={"help": "The codec, a Hub id or a directory."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from these weights, a Hub id or a directory; otherwise from nothing."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Where a new model differs from the released one: a JSON object or a file with one, "
            'such as {"hidden_size": 256, "text_encoder_config": {"hidden_size": 256}}.'
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "The text tokenizer (default: the one of `model_name_or_path`)."}
    )
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Train a tokenizer of so many ids on the texts, for a new model."}
    )
    language: str = field(default="en", metadata={"help": "Language of the texts, Whisper's code."})
    phonemes: bool = field(default=True, metadata={"help": "Read English as phonemes, which needs the `[tts]` extra."})
    sample_texts: list[str] = field(
        default_factory=lambda: ["The frame rate follows the speech.", "Good morning, how are you today?"],
        metadata={"help": "Texts to speak along the way."},
    )
    sample_steps: int = field(
        default=1000, metadata={"help": "Steps between samples; there is one at the end. 0: none."}
    )
    sample_tokens: int = field(default=200, metadata={"help": "Tokens of a sample at most."})


def load_tokenizer(model_args: ModelArguments, dataset: Any) -> Any:
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    if model_args.tokenizer_vocab_size is None:
        raise ValueError("A new model needs a tokenizer: pass `--tokenizer_name` or `--tokenizer_vocab_size`.")
    texts = (example["text"] for example in islice(dataset.remove_columns("audio"), NUM_TOKENIZER_TEXTS))
    prepared = (prepare_text(text, model_args.language, phonemes=model_args.phonemes) for text in texts)
    return train_text_tokenizer(prepared, model_args.tokenizer_vocab_size, [model_args.language])


def load_model(model_args: ModelArguments, codec: FlexiCodecModel, tokenizer: Any) -> Any:
    codebook_size = codec.config.semantic_codebook_size
    if model_args.model_name_or_path is not None:
        model = FlexiCodecARForConditionalGeneration.from_pretrained(model_args.model_name_or_path)
    else:
        config = override_config(
            FlexiCodecARConfig(),
            model_args.config_overrides,
            speech_vocab_size=codebook_size,
            text_encoder_config={"vocab_size": len(tokenizer)},
        )
        model = FlexiCodecARForConditionalGeneration(config)
    config = model.config
    if config.speech_vocab_size != codebook_size or config.num_durations <= codec.config.max_frames_per_token:
        raise ValueError(
            f"The model speaks {config.speech_vocab_size} codes of up to {config.num_durations - 1} frames, the codec "
            f"has {codebook_size} codes of up to {codec.config.max_frames_per_token}."
        )
    if config.text_encoder_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The model knows {config.text_encoder_config.vocab_size} text ids, the tokenizer has {len(tokenizer)}."
        )
    return model


@dataclass
class Speaker:
    """
    Speaks texts along the way, at every threshold of the model. The codec decodes the semantic
    tokens alone.
    """

    model_args: ModelArguments
    tokenizer: Any
    codec: FlexiCodecModel

    def __call__(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        args = self.model_args
        for number, text in enumerate(args.sample_texts):
            ids = encode_text(self.tokenizer, text, args.language, phonemes=args.phonemes)
            for threshold in model.config.merging_thresholds or [None]:
                inputs = model.build_inputs(torch.tensor([ids], device=model.device), merging_threshold=threshold)
                output = model.generate(**inputs, max_new_tokens=args.sample_tokens, return_dict_in_generate=True)
                new = slice(inputs["input_ids"].shape[1], None)
                codes, lengths = output.sequences[:, new], output.token_lengths[:, new]
                spoken = lengths[0] > 0
                if not spoken.any():
                    logger.warning("Nothing was spoken for %r at threshold %s.", text, threshold)
                    continue
                decoded = self.codec.decode(codes[:, None, spoken], lengths[:, spoken])
                yield f"{number}" if threshold is None else f"{number}-{threshold}", decoded.audio_values[0, 0]


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, TTSDataArguments, SpeechTrainingArguments, argv=argv
    )
    with training_args.main_process_first(local=False):
        train_dataset, eval_dataset = load_splits(
            data_args, training_args.seed, evaluate=training_args.do_eval, needs_text=True
        )
    codec = FlexiCodecModel.from_pretrained(model_args.codec).to(training_args.device)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.codec)
    tokenizer = load_tokenizer(model_args, train_dataset)
    model = load_model(model_args, codec, tokenizer)
    thresholds = model.config.merging_thresholds or [codec.config.merging_threshold]
    encoder = SpeechEncoder(codec, feature_extractor, thresholds)
    train_dataset, eval_dataset = cache_splits(encoder, train_dataset, eval_dataset, data_args)

    speaker = Speaker(model_args, tokenizer, codec)
    samples = SpeechSamples(speaker, codec.config.sampling_rate, model_args.sample_steps)
    # The tokenizer is saved as the collator's: as `processing_class` it would be made to share the
    # model's special ids.
    trainer = TTSTrainer(
        model,
        training_args,
        data_collator=SpeechCollator(feature_extractor, tokenizer, model_args.language, model_args.phonemes),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[samples] if model_args.sample_steps else None,
        prepare=ARBatches(model, encoder),
    )
    run_training(trainer, data_args, tasks="text-to-speech")


if __name__ == "__main__":
    main()
