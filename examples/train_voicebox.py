"""
Train the Voicebox: from semantic tokens of a codec and a voice prompt to a mel spectrogram (or the
codec's latents).

accelerate launch examples/train_voicebox.py --codec flexicodec --dataset my_speech --output_dir voicebox --do_eval \
    --per_device_train_batch_size 16 --learning_rate 1e-4 --warmup_steps 1000 --max_steps 100000 --bf16 \
    --eval_strategy steps --eval_steps 1000 --save_steps 1000 --report_to tensorboard --vocoder vocoder
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoFeatureExtractor

from flexicodec_hf import (
    FlexiCodecMelFeatureExtractor,
    FlexiCodecModel,
    FlexiCodecVocoderModel,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
)
from flexicodec_hf.training.batches import load_splits, with_seeds
from flexicodec_hf.training.trainer import (
    SpeechSamples,
    SpeechTrainingArguments,
    override_config,
    parse_arguments,
    run_training,
)
from flexicodec_hf.training.tts import (
    SpeechCollator,
    SpeechEncoder,
    TTSDataArguments,
    TTSTrainer,
    VoiceboxBatches,
    cache_splits,
)


@dataclass
class ModelArguments:
    """The model, the codec whose tokens it reads, and what it predicts."""

    codec: str = field(metadata={"help": "The codec, a Hub id or a directory."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from these weights, a Hub id or a directory; otherwise from nothing."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Where a new model differs from the released one: a JSON object or a file with one, "
            'such as {"hidden_size": 256, "num_hidden_layers": 6, "repa_layer_index": 2}. There is no alignment loss '
            'with "repa_layer_index": null.'
        },
    )
    predict_latents: bool = field(
        default=False,
        metadata={
            "help": "A new model predicts the codec's decoder latents at 12.5 Hz instead of a mel spectrogram. It "
            "needs no vocoder."
        },
    )
    merging_thresholds: list[float] = field(
        default_factory=lambda: [0.86, 0.91, 1.0],
        metadata={"help": "The codec's merging thresholds to learn from, one drawn for each clip in each step."},
    )
    vocoder: str | None = field(
        default=None, metadata={"help": "A vocoder, a Hub id or a directory, to hear mel spectrograms along the way."}
    )
    sample_steps: int = field(
        default=1000, metadata={"help": "Steps between samples of evaluation clips; there is one at the end. 0: none."}
    )
    num_samples: int = field(default=3, metadata={"help": "Clips to speak, each in the voice of the next one."})


def load_model(model_args: ModelArguments, codec: FlexiCodecModel, statistics: Any) -> Any:
    if model_args.model_name_or_path is not None:
        model = FlexiCodecVoiceboxModel.from_pretrained(model_args.model_name_or_path)
        if model_args.predict_latents and not model.config.predicts_latent:
            raise ValueError(
                f"{model_args.model_name_or_path} predicts mel spectrograms: leave out --predict_latents."
            )
    else:
        values = {
            "codebook_size": codec.config.semantic_codebook_size,
            "semantic_hidden_size": codec.config.semantic_model_config.hidden_size,
        }
        if model_args.predict_latents:
            values |= {"num_mel_bins": codec.config.hidden_size, "upsample_factor": 1, **statistics()}
        config = override_config(FlexiCodecVoiceboxConfig(), model_args.config_overrides, **values)
        model = FlexiCodecVoiceboxModel(config)
    for name, value, expected in (
        ("codes", model.config.codebook_size, codec.config.semantic_codebook_size),
        ("latent channels", model.config.num_mel_bins, codec.config.hidden_size),
    ):
        if value != expected and (name == "codes" or model.config.predicts_latent):
            raise ValueError(f"The model has {value} {name}, the codec {expected}.")
    return model


def load_mel_feature_extractor(model_args: ModelArguments, config: Any, codec_config: Any) -> Any:
    if model_args.model_name_or_path is not None:
        extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    else:
        extractor = FlexiCodecMelFeatureExtractor(feature_size=config.num_mel_bins)
    mel_rate = extractor.sampling_rate / extractor.hop_length
    if mel_rate != codec_config.frame_rate * config.upsample_factor:
        raise ValueError(
            f"The mel spectrogram has {mel_rate} frames a second, but the model makes {config.upsample_factor} for "
            f"each of the codec's {codec_config.frame_rate}: set `upsample_factor`."
        )
    return extractor


@dataclass
class Speaker:
    """Speaks the tokens of some clips along the way, each in the voice of the one after it."""

    batches: VoiceboxBatches
    batch: dict[str, Tensor]
    codec: FlexiCodecModel
    vocoder: FlexiCodecVocoderModel | None

    def __call__(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        inputs, _ = self.batches(self.batch)
        num_clips = len(inputs["audio_codes"])
        for clip in range(num_clips):
            voice = slice((clip + 1) % num_clips, (clip + 1) % num_clips + 1)
            output = model.sample(
                inputs["audio_codes"][clip : clip + 1],
                inputs["token_lengths"][clip : clip + 1],
                prompt_codes=inputs["audio_codes"][voice],
                prompt_token_lengths=inputs["token_lengths"][voice],
                prompt_mel=inputs["labels"][voice],
                prompt_mel_mask=inputs["mel_mask"][voice],
            )
            if model.config.predicts_latent:
                audio = self.codec.decode(latents=output.mel.transpose(1, 2)).audio_values[0, 0]
            else:
                audio = self.vocoder(output.mel).audio_values.flatten()
            yield str(clip), audio


def make_sampler(
    model_args: ModelArguments, batches: VoiceboxBatches, collator: SpeechCollator, dataset: Any
) -> SpeechSamples | None:
    codec = batches.encoder.codec
    if (
        dataset is None
        or not model_args.sample_steps
        or not (batches.model.config.predicts_latent or model_args.vocoder)
    ):
        return None
    vocoder, sampling_rate = None, codec.config.sampling_rate
    if not batches.model.config.predicts_latent:
        vocoder = FlexiCodecVocoderModel.from_pretrained(model_args.vocoder).to(codec.device)
        sampling_rate = vocoder.config.sampling_rate
    clips = with_seeds(dataset.take(model_args.num_samples), 0)
    batch = collator([clips[clip] for clip in range(len(clips))])
    batch = {name: value.to(codec.device) for name, value in batch.items()}
    return SpeechSamples(Speaker(batches, batch, codec, vocoder), sampling_rate, model_args.sample_steps)


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, TTSDataArguments, SpeechTrainingArguments, argv=argv
    )
    with training_args.main_process_first(local=False):
        train_dataset, eval_dataset = load_splits(
            data_args, training_args.seed, evaluate=training_args.do_eval, needs_text=False
        )
    codec = FlexiCodecModel.from_pretrained(model_args.codec).to(training_args.device)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.codec)
    encoder = SpeechEncoder(codec, feature_extractor, model_args.merging_thresholds)
    model = load_model(model_args, codec, lambda: encoder.latent_statistics(train_dataset))
    encoder.semantic_frames = model.config.repa_layer_index is not None
    encoder.latents = model.config.predicts_latent
    train_dataset, eval_dataset = cache_splits(encoder, train_dataset, eval_dataset, data_args)

    mel_feature_extractor = None
    if not model.config.predicts_latent:
        mel_feature_extractor = load_mel_feature_extractor(model_args, model.config, codec.config)
    collator = SpeechCollator(feature_extractor, mel_feature_extractor=mel_feature_extractor)
    batches = VoiceboxBatches(model, encoder)
    sampler = make_sampler(model_args, batches, collator, eval_dataset)
    trainer = TTSTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=mel_feature_extractor,
        callbacks=[] if sampler is None else [sampler],
        prepare=batches,
    )
    run_training(trainer, data_args, tasks="text-to-speech")


if __name__ == "__main__":
    main()
