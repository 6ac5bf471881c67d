"""
Train a language model on speech: FlexiCodec's tokens, with their durations, through `Trainer`.

    flexicodec-hf tokenize recordings -o tokens --model flexicodec --target-frame-rates 8.3
    python examples/train_speech_lm.py --tokens tokens --codec flexicodec --output_dir speech_lm --max_steps 1000

`--tokens` is a directory (or Hub id) that `datasets` loads, with the columns `audio_codes`,
`token_lengths`, `duration` and `frame_rate`, and `text` if `--parts` names it. Without
`--model_name_or_path` the model is a small Llama that reads bytes; with it, any causal language
model learns to speak. An interrupted run continues from its last checkpoint. At the end the script
reports bits per second of held-out speech and the share of durations that the model would have got
right, and writes a held-out clip that the model continues to `continuation.wav`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextToWaveform,
    AutoTokenizer,
    EvalPrediction,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from flexicodec_hf.audio_flexicodec import write_audio
from flexicodec_hf.speech_lm import FlexiCodecSpeechVocabulary, SpeechTextCollator, duration_lm_class
from flexicodec_hf.training.trainer import SpeechTrainingArguments, last_checkpoint, parse_arguments


@dataclass
class SpeechArguments:
    tokens: str = field(metadata={"help": "Dataset of tokens: a directory or a Hub id."})
    codec: str = field(metadata={"help": "The codec that made them: a directory or a Hub id."})
    train_split: str = field(default="train", metadata={"help": "The split to train on, and to hold out clips of."})
    num_eval_examples: int = field(
        default=100, metadata={"help": "Clips to hold out, at most a tenth of all (one at least)."}
    )
    max_duration_s: float = field(default=30.0, metadata={"help": "Leave out clips longer than this, in seconds."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A causal language model to start from."})
    layout: str = field(
        default="parallel", metadata={"help": "Layout of the vocabulary: parallel, separate or joint."}
    )
    parts: list[str] = field(
        default_factory=lambda: ["speech"], metadata={"help": "'speech', or 'text speech' to learn to speak a text."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the small Llama."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the small Llama."})
    prompt_seconds: float = field(default=1.5, metadata={"help": "How much of a held-out clip to continue."})
    max_new_seconds: float = field(default=5.0, metadata={"help": "How long to go on, if speech does not end before."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of the continuation."})
    voice_stage: str | None = field(
        default=None, metadata={"help": "A FlexiCodec text-to-speech model whose voice speaks the continuation."}
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: the small Llama has little text to learn a better one from."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")


def make_model(
    arguments: SpeechArguments, codec_config: PreTrainedConfig
) -> tuple[PreTrainedModel, FlexiCodecSpeechVocabulary]:
    source = arguments.model_name_or_path
    tokenizer = make_tokenizer() if source is None else AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = FlexiCodecSpeechVocabulary.for_codec(tokenizer, codec_config, arguments.layout)
    if source is not None:
        config = AutoConfig.from_pretrained(source)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=4 * arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.hidden_size // 64 or 1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    if vocabulary.is_parallel:
        model_class = duration_lm_class(config, vocabulary)
        model = model_class(config) if source is None else model_class.from_pretrained(source, config=config)
    elif source is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
    vocabulary.resize_embeddings(model)
    return model, vocabulary


def load_rows(arguments: SpeechArguments) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows held out."""
    rows = load_dataset(arguments.tokens, split=arguments.train_split)
    kept = [index for index, seconds in enumerate(rows["duration"]) if seconds <= arguments.max_duration_s]
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} clips are longer than {arguments.max_duration_s} s and left out."
        )
    if len(kept) < 2:
        raise SystemExit(f"{arguments.tokens} has {len(kept)} clips to use: at least 2 are needed.")
    num_eval = max(1, min(arguments.num_eval_examples, len(kept) // 10))
    return rows.select(kept[:-num_eval]), rows.select(kept[-num_eval:])


class SpeechMetrics:
    """Bits per second of speech, and the share of durations that the likeliest guess gets right."""

    def __init__(self, vocabulary: FlexiCodecSpeechVocabulary, frame_rate: float):
        self.vocabulary = vocabulary
        self.frame_rate = frame_rate

    def scores(self, logits: Tensor | tuple[Tensor, Tensor], labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """
        What of the logits the metrics need, on the device, so that the logits need not be kept:
        nats of each label and of each duration label, and the best guesses of both, `(batch_size,
        length, 4)`.
        """
        columns = []
        if not self.vocabulary.is_parallel:
            logits, labels = (logits, None), (labels, None)
        for score, label in zip(logits, labels, strict=True):
            if score is None:
                columns += [torch.zeros_like(columns[0])] * 2
                continue
            if not columns:  # the tokens: the position before predicts
                score, label = F.pad(score[:, :-1], (0, 0, 1, 0)), label
            else:
                label = torch.where(label > 0, label - 1, -100)
            nats = F.cross_entropy(score.float().transpose(1, 2), label, reduction="none")
            columns += [nats, score.argmax(dim=-1).float()]
        return torch.stack(columns, dim=-1)

    def compute(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, guesses, duration_nats, duration_guesses = np.moveaxis(prediction.predictions, -1, 0)
        vocabulary = self.vocabulary
        labels = prediction.label_ids[0] if vocabulary.is_parallel else prediction.label_ids
        is_speech = vocabulary.is_speech(torch.from_numpy(labels)).numpy()
        if vocabulary.is_parallel:
            durations = prediction.label_ids[1]
            is_token = durations > 0
            hits = duration_guesses + 1 == durations
        else:
            first, size = vocabulary.duration_ids
            offset = labels - first
            is_token = (offset >= 0) & (offset < size)
            durations = offset % vocabulary.max_frames_per_token + 1
            hits = (guesses - first) % vocabulary.max_frames_per_token + 1 == durations
            hits &= (guesses >= first) & (guesses < first + size)
        seconds = durations[is_token].sum() / self.frame_rate
        total = nats[is_speech].sum() + (duration_nats[is_token].sum() if vocabulary.is_parallel else 0)
        return {
            "bits_per_second": float(total / log(2) / seconds),
            "duration_accuracy": float(hits[is_token].mean()),
            "seconds": float(seconds),
        }


@torch.inference_mode()
def continue_speech(
    model: PreTrainedModel,
    vocabulary: FlexiCodecSpeechVocabulary,
    row: dict[str, Any],
    arguments: SpeechArguments,
    frame_rate: float,
) -> tuple[Tensor, Tensor, float]:
    """
    Codes and durations of a clip's beginning and of what the model says next, and the seconds of
    the beginning.
    """
    lengths = torch.tensor(row["token_lengths"])
    num_tokens = max(int((lengths.cumsum(dim=0) <= arguments.prompt_seconds * frame_rate).sum()), 1)
    codes = torch.tensor(row["audio_codes"])[:, :num_tokens]
    parts = [row["text"]] if "text" in arguments.parts else []
    stream = vocabulary.join([*parts, vocabulary.encode_prompt(codes, lengths[:num_tokens])])
    prompt = {name: value.to(model.device) for name, value in vocabulary.pad([stream], "left").items()}
    end = vocabulary.tokenizer.convert_tokens_to_ids(vocabulary.end_token)
    ids_per_token = 2 if arguments.layout == "separate" else 1
    output = model.generate(
        **prompt,
        # One token a frame is the most that can be needed; the last token's duration is not known.
        max_new_tokens=int(arguments.max_new_seconds * frame_rate * ids_per_token) + 1,
        eos_token_id=[end, vocabulary.tokenizer.eos_token_id],
        pad_token_id=vocabulary.tokenizer.pad_token_id,
        do_sample=True,
        temperature=arguments.temperature,
        return_dict_in_generate=True,
    )
    spoken = {"input_ids": output.sequences[0].cpu()}
    if vocabulary.is_parallel:
        spoken["token_lengths"] = output.token_lengths[0].cpu()
    (span,) = vocabulary.speech_spans(spoken["input_ids"])
    spoken = {name: value[span] for name, value in spoken.items()}
    print(f"\nThe continuation: {vocabulary.render(**spoken)}")
    codes, all_lengths = vocabulary.decode(**vocabulary.repair(**spoken))
    return codes, all_lengths, float(lengths[:num_tokens].sum()) / frame_rate


@torch.inference_mode()
def speak(codes: Tensor, lengths: Tensor, arguments: SpeechArguments) -> tuple[np.ndarray, int]:
    """
    The waveform of tokens and its sampling rate: from the codec, or in the voice of a
    text-to-speech model.
    """
    if arguments.voice_stage is not None:
        voice_stage = AutoModelForTextToWaveform.from_pretrained(arguments.voice_stage)
        speech = voice_stage.decode_speech(codes[None], lengths[None])
        return speech.audio[0, 0].numpy(), int(speech.sampling_rate[0])
    codec = AutoModel.from_pretrained(arguments.codec)
    return codec.decode(codes[None], lengths[None]).audio_values[0, 0].numpy(), codec.config.sampling_rate


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    arguments, training = parse_arguments(SpeechArguments, SpeechTrainingArguments, argv=argv)
    codec_config = AutoConfig.from_pretrained(arguments.codec)
    rows, eval_rows = load_rows(arguments)
    model, vocabulary = make_model(arguments, codec_config)
    training.label_names = ["labels", "duration_labels"] if vocabulary.is_parallel else ["labels"]
    metrics = SpeechMetrics(vocabulary, codec_config.frame_rate)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=SpeechTextCollator(vocabulary, parts=tuple(arguments.parts), pad_to_multiple_of=8),
        processing_class=vocabulary.tokenizer,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.scores,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last_checkpoint(training.output_dir))
    trainer.save_model()

    result = trainer.evaluate()
    num_tokens = sum(map(len, eval_rows["token_lengths"]))
    raw = num_tokens * codec_config.bits_per_token(1) / sum(eval_rows["duration"])
    print(
        f"\nHeld out, {result['eval_seconds']:.1f} s of speech: {result['eval_bits_per_second']:.1f} bits per second "
        f"({raw:.1f} without a model), {100 * result['eval_duration_accuracy']:.1f} % of the durations right."
    )
    model.eval()
    codes, lengths, prompt_seconds = continue_speech(
        model, vocabulary, eval_rows[0], arguments, codec_config.frame_rate
    )
    waveform, sampling_rate = speak(codes, lengths, arguments)
    path = Path(training.output_dir) / "continuation.wav"
    write_audio(path, waveform, sampling_rate)
    print(f"{path}: {len(waveform) / sampling_rate:.2f} s, of which the first {prompt_seconds:.2f} s are the prompt.")
    return result


if __name__ == "__main__":
    main()
