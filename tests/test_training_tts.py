"""The training recipes of the AR model and the Voicebox, run whole with tiny models on cuts of recorded clips."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoFeatureExtractor, AutoTokenizer, TrainingArguments, pipeline

from conftest import AUDIO, assert_close
from flexicodec_hf import (
    FlexiCodecARConfig,
    FlexiCodecARForConditionalGeneration,
    FlexiCodecModel,
    FlexiCodecVocoderConfig,
    FlexiCodecVocoderModel,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
)
from flexicodec_hf.audio_flexicodec import read_audio, write_audio
from flexicodec_hf.data.sources import load_speech
from flexicodec_hf.text_flexicodec import encode_text
from flexicodec_hf.training import batches
from flexicodec_hf.training.batches import load_splits, with_seeds
from flexicodec_hf.training.trainer import SpeechTrainingArguments, override_config
from flexicodec_hf.training.tts import (
    CODEC_INPUTS,
    ARBatches,
    SpeechCollator,
    SpeechEncoder,
    TTSDataArguments,
    TTSTrainer,
    VoiceboxBatches,
    cache_splits,
    train_text_tokenizer,
)


EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_SIZES = SIZES | {"num_hidden_layers": 1}
AR = SIZES | {"text_encoder_config": TEXT_SIZES}
# Dropout is drawn by each process: without it, two processes must do what one does.
NO_DROPOUT = {"hidden_dropout": 0.0, "text_encoder_config": TEXT_SIZES | {"hidden_dropout": 0.0}}
VOICEBOX = SIZES | {"repa_layer_index": 1, "repa_hidden_size": 32}
MEL_VOICEBOX = VOICEBOX | {"num_mel_bins": 16}

RECIPES = {
    "ar": (
        "train_ar.py",
        AR,
        ["--tokenizer_vocab_size", "260", "--phonemes", "false", "--sample_tokens", "3", "--sample_texts", "Hello."],
    ),
    "voicebox": ("train_voicebox.py", MEL_VOICEBOX, ["--num_samples", "1"]),
    "latent_voicebox": ("train_voicebox.py", VOICEBOX, ["--predict_latents", "--num_samples", "1"]),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of 12 clips of 1 to 2.1 seconds with metadata."""
    folder = tmp_path_factory.mktemp("speech")
    waveform = read_audio(AUDIO / "librivox_long.flac", 16_000).waveform
    rows = []
    for clip in range(12):
        write_audio(folder / f"{clip}.wav", waveform[clip * 40_000 :][: 16_000 + 1600 * clip], 16_000)
        rows.append({"file_name": f"{clip}.wav", "text": f"Clip number {clip} of a long recording."})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(recipe, codec_dir, speech, output_dir, *changes, **config):
    script, overrides, extra = RECIPES[recipe]
    return [
        str(EXAMPLES / script),
        *("--codec", str(codec_dir()), "--dataset", str(speech), "--output_dir", str(output_dir)),
        *("--config_overrides", json.dumps(overrides | config), "--do_train", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "3e-3", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
        *("--sample_steps", "0", *extra, *changes),
    ]


def run(monkeypatch, device, *args):
    """Runs a recipe in this process; the losses of its steps."""
    argv = [*args, "--use_cpu", str(device == "cpu")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    return losses(Path(argv[argv.index("--output_dir") + 1]))


def losses(output_dir):
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize("recipe", ["ar", "voicebox", pytest.param("latent_voicebox", marks=pytest.mark.slow)])
def test_a_recipe_learns_speaks_and_resumes_to_the_same_losses(
    recipe, codec_dir, speech, tmp_path, monkeypatch, device
):
    if device == "mps":
        pytest.skip("Trainer's random states are those of CPU and CUDA")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    args = ("--max_steps", "6", "--save_steps", "3", "--do_eval", "--num_eval_examples", "4")
    if recipe == "voicebox":
        sizes = {"num_mel_bins": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        FlexiCodecVocoderModel(FlexiCodecVocoderConfig(**sizes)).save_pretrained(tmp_path / "vocoder")
        args += ("--vocoder", str(tmp_path / "vocoder"))
    first = run(monkeypatch, device, *arguments(recipe, codec_dir, speech, whole, *args))
    assert sorted(first) == list(range(1, 7))
    assert first[5] + first[6] < first[1] + first[2]
    metrics = json.loads((whole / "eval_results.json").read_text())
    parts = {"ar": ("token_loss", "duration_loss")}.get(recipe, ("flow_loss", "repa_loss"))
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{part}"] for part in parts), rel=1e-5)
    assert (whole / "README.md").is_file()

    # Half of it, with samples on the way: they must not touch the random numbers.
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    second = run(monkeypatch, device, *arguments(recipe, codec_dir, speech, resumed, *args, "--sample_steps", "4"))
    assert [second[step] for step in (4, 5, 6)] == [first[step] for step in (4, 5, 6)]

    heard = {path.parent.name for path in resumed.glob("samples/*/*.flac")}
    if recipe == "ar":
        model = FlexiCodecARForConditionalGeneration.from_pretrained(whole)
        tokenizer = AutoTokenizer.from_pretrained(whole)
        ids = encode_text(tokenizer, "Clip number 3.", phonemes=False)
        assert tokenizer.decode(ids) == "<|en|>Clip number 3." and max(ids) < len(tokenizer) == 260
        assert model.config.text_encoder_config.vocab_size == 260 and model.config.use_cache
        assembled_model_speaks(codec_dir(), whole, speech / "0.wav", tmp_path / "assembled")
    else:
        model = FlexiCodecVoiceboxModel.from_pretrained(whole)
        assert model.config.predicts_latent == (recipe == "latent_voicebox")
        if recipe == "voicebox":
            assert AutoFeatureExtractor.from_pretrained(whole).feature_size == 16
    assert heard == {"step-00000004", "step-00000006"}


def assembled_model_speaks(codec, ar, recording, output_dir):
    main = runpy.run_path(str(EXAMPLES / "assemble_tts.py"))["main"]
    options = ["--codec", str(codec), "--ar", str(ar), "--output_dir", str(output_dir), "--storage_dtype", "float16"]
    main([*options, "--voice", f"me={recording}:Clip number 0: a long recording."])
    assert (output_dir / "tts" / "model.safetensors").stat().st_size < (ar / "model.safetensors").stat().st_size
    tts = pipeline("text-to-speech", model=str(output_dir))
    assert tts.model.voices["me"].metadata == {"text": "Clip number 0: a long recording."}
    spoken = tts("Hello.", generate_kwargs={"seed": 0, "max_new_tokens": 5})
    assert spoken["audio"].any() and spoken["sampling_rate"] == 16_000
    with pytest.raises(SystemExit):
        main([*options, "--voice", "me.wav"])


def test_a_stream_trains_and_resumes(codec_dir, speech, tmp_path, monkeypatch, device):
    def train(name):
        args = ("--streaming", "--max_steps", "5", "--save_steps", "3", "--max_train_examples", "10")
        return run(monkeypatch, device, *arguments("ar", codec_dir, speech, tmp_path / name, *args))

    first = train("whole")
    assert sorted(first) == [1, 2, 3, 4, 5]
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    second = train("resumed")
    assert [second[step] for step in (4, 5)] == [first[4], first[5]]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--streaming"], ["--token_cache", "cache"]], ids=["map", "stream", "cache"])
@pytest.mark.parametrize("recipe", ["ar", "voicebox"])
def test_two_processes_are_one_with_twice_the_batch(recipe, extra, codec_dir, speech, tmp_path):
    config = NO_DROPOUT if recipe == "ar" else {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = []
    for count in (1, 2):
        output_dir = tmp_path / str(count)
        args = arguments(recipe, codec_dir, speech, output_dir, "--max_steps", "4", "--use_cpu", *extra, **config)
        args[args.index("--per_device_train_batch_size") + 1] = str(4 // count)
        if "--streaming" in extra and recipe == "voicebox":
            args += ["--do_eval", "--num_eval_examples", "4"]
        # `--cpu` would start one process, whatever the number.
        launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
        options = "--mixed_precision no --dynamo_backend no"
        command = [sys.executable, *(f"{launch} {options}".split() if count == 2 else []), *args]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        state = json.loads((output_dir / "trainer_state.json").read_text())
        found.append([state["epoch"], *losses(output_dir).values()])
    assert len(found[0]) == 5 and found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.fixture
def encoder(codec_dir, device):
    codec = FlexiCodecModel.from_pretrained(codec_dir()).to(device)
    return SpeechEncoder(codec, AutoFeatureExtractor.from_pretrained(codec_dir()), [0.86, 1.0], True, True)


def batch_of(encoder, examples, **collator):
    batch = SpeechCollator(encoder.feature_extractor, **collator)(list(with_seeds(examples, 1)))
    return {name: value.to(encoder.codec.device) for name, value in batch.items()}


def test_cached_examples_make_the_batches_of_raw_ones(encoder, speech, tmp_path, monkeypatch, device):
    raw = load_speech(speech).select(range(6))
    monkeypatch.setattr(batches, "CLIPS_PER_FILE", 3)
    for process in (1, 0):
        assert len(encoder.cache(raw, tmp_path, 2, slice(process, None, 2))) == 3
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cached = encoder.cache(raw, tmp_path, 2)
    assert len(files) == 2 and {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert cached["text"] == raw["text"]

    tokenizer = train_text_tokenizer(iter(raw["text"]), 260, ["en"])
    config = {"text_encoder_config": TEXT_SIZES | {"vocab_size": 260}, "merging_thresholds": [0.86, 1.0]}
    ar = FlexiCodecARForConditionalGeneration(FlexiCodecARConfig(**SIZES | config)).to(device)
    statistics = encoder.latent_statistics(raw)
    sizes = {"num_mel_bins": 32, "upsample_factor": 1, "semantic_hidden_size": 32}
    voicebox = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**VOICEBOX | sizes | statistics)).to(device)
    for prepare, options in (
        (ARBatches(ar, encoder), {"tokenizer": tokenizer, "phonemes": False}),
        (VoiceboxBatches(voicebox, encoder), {}),
    ):
        inputs, counts = prepare(batch_of(encoder, raw, **options))
        again, counts_again = prepare(batch_of(encoder, cached, **options))
        assert inputs.keys() == again.keys() and counts == counts_again
        for name, value in inputs.items():
            # Features and latents are kept in float16.
            assert not isinstance(value, torch.Tensor) or torch.allclose(value.float(), again[name].float(), atol=0.02)
    # Another epoch draws anew.
    batch = batch_of(encoder, raw)
    batch["seeds"][:, 1] += 1
    assert not torch.equal(prepare(batch)[0]["noise"], inputs["noise"])


def test_the_ar_model_is_told_the_threshold_of_each_clip(encoder, speech, device):
    raw = load_speech(speech)
    tokenizer = train_text_tokenizer(iter(raw["text"]), 260, ["en"])
    config = {"text_encoder_config": TEXT_SIZES | {"vocab_size": 260}, "merging_thresholds": [0.86, 1.0]}
    model = FlexiCodecARForConditionalGeneration(FlexiCodecARConfig(**SIZES | config)).to(device)
    batch = batch_of(encoder, raw, tokenizer=tokenizer, phonemes=False)
    inputs, counts = ARBatches(model, encoder)(batch)
    unmerged = (inputs["input_ids"] == model.config.threshold_token_id(1.0)).any(dim=1)
    merged = (inputs["input_ids"] == model.config.threshold_token_id(0.86)).any(dim=1)
    assert unmerged.any() and torch.equal(merged, ~unmerged) and merged.any()
    for threshold, rows in ((1.0, unmerged), (0.86, merged)):
        encoded = encoder.codec.encode(**{name: batch[name] for name in CODEC_INPUTS}, merging_threshold=threshold)
        expected = [item[item > 0].tolist() for item in encoded.token_lengths[rows]]
        lengths = inputs["duration_labels"][rows]
        assert [item[item > 0].tolist() for item in lengths] == expected
    assert counts["token_loss"] == counts["duration_loss"] + len(raw)

    model.config.merging_thresholds = []
    encoder.thresholds = [0.86]
    inputs, _ = ARBatches(model, encoder)(batch)
    assert (inputs["input_ids"] == model.config.no_threshold_token_id).sum() == len(raw)


def test_recipes_start_from_given_weights_that_fit_the_codec(codec_dir, tmp_path):
    codec = FlexiCodecModel.from_pretrained(codec_dir())
    script = runpy.run_path(str(EXAMPLES / "train_ar.py"))
    tokenizer = train_text_tokenizer(iter(["a text"]), 260, ["en"])

    def load(codes, vocab_size):
        config = FlexiCodecARConfig(
            **SIZES, speech_vocab_size=codes, text_encoder_config=TEXT_SIZES | {"vocab_size": vocab_size}
        )
        model = FlexiCodecARForConditionalGeneration(config)
        model.save_pretrained(tmp_path / "ar")
        tokenizer.save_pretrained(tmp_path / "ar")
        args = script["ModelArguments"](codec="", model_name_or_path=str(tmp_path / "ar"))
        loaded = script["load_model"](args, codec, script["load_tokenizer"](args, None))
        return model.lm_head.weight, loaded.lm_head.weight

    assert torch.equal(*load(32768, 260))
    with pytest.raises(ValueError, match="speaks 100 codes of up to 9 frames, the codec has 32768 codes of up to 8"):
        load(100, 260)
    with pytest.raises(ValueError, match="knows 50 text ids, the tokenizer has 260"):
        load(32768, 50)
    with pytest.raises(ValueError, match="--tokenizer_name` or `--tokenizer_vocab_size"):
        script["load_tokenizer"](script["ModelArguments"](codec=""), None)

    script = runpy.run_path(str(EXAMPLES / "train_voicebox.py"))
    args = script["ModelArguments"](codec="", model_name_or_path=str(tmp_path / "vb"), predict_latents=True)
    FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**VOICEBOX)).save_pretrained(tmp_path / "vb")
    with pytest.raises(ValueError, match="vb predicts mel spectrograms: leave out --predict_latents"):
        script["load_model"](args, codec, None)
    FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**VOICEBOX, codebook_size=9)).save_pretrained(tmp_path / "vb")
    args.predict_latents = False
    with pytest.raises(ValueError, match="The model has 9 codes, the codec 32768"):
        script["load_model"](args, codec, None)
    args.model_name_or_path = None
    config = FlexiCodecVoiceboxConfig(**VOICEBOX, upsample_factor=2)
    with pytest.raises(
        ValueError, match=r"has 50.0 frames a second, but the model makes 2 for each of the codec's 12.5"
    ):
        script["load_mel_feature_extractor"](args, config, codec.config)


def test_splits_hold_out_filter_and_complain(speech, tmp_path):
    def sizes(**changes):
        train, evaluation = load_splits(TTSDataArguments(str(speech), **changes), 0, needs_text=True)
        assert not set(train["text"]) & set(evaluation["text"]) or "eval_dataset" in changes
        return len(train), len(evaluation)

    assert sizes(num_eval_examples=3) == (9, 3)
    assert sizes(num_eval_examples=3, min_duration_s=1.45, max_train_examples=4) == (4, 3)
    assert sizes(eval_dataset=str(speech)) == (12, 12)
    with pytest.raises(
        ValueError, match=r"Nothing is left of .* to train on: no clip lasts 5 to 30.0 s and has a text"
    ):
        sizes(min_duration_s=5)
    shutil.copy(speech / "0.wav", tmp_path / "0.wav")
    with pytest.raises(ValueError, match="has no texts: name their column with `--text_column`"):
        load_splits(TTSDataArguments(str(tmp_path)), 0, evaluate=False, needs_text=True)
    stream, evaluation = load_splits(
        TTSDataArguments(str(speech), streaming=True, num_eval_examples=3), 0, needs_text=True
    )
    texts = [example["text"] for example in stream]
    assert len(texts) == 9 and not set(texts) & set(evaluation["text"])
    with pytest.raises(ValueError, match="`--token_cache` keeps what is read, `--streaming` does not"):
        cache_splits(None, stream, evaluation, TTSDataArguments("", token_cache=str(tmp_path)))


def test_config_overrides_reach_any_depth_and_know_every_key(tmp_path):
    config = override_config(
        FlexiCodecARConfig(),
        '{"hidden_size": 64, "text_encoder_config": {"hidden_size": 32}}',
        text_encoder_config={"vocab_size": 99},
    )
    assert config.hidden_size == 64
    assert (config.text_encoder_config.hidden_size, config.text_encoder_config.vocab_size) == (32, 99)
    assert config.text_encoder_config.num_hidden_layers == 4
    (tmp_path / "sizes.json").write_text('{"hidden_size": 128}')
    assert override_config(FlexiCodecARConfig(), str(tmp_path / "sizes.json")).hidden_size == 128
    with pytest.raises(ValueError, match=r"names text_encoder_config.width, which the configuration does not have"):
        override_config(FlexiCodecARConfig(), '{"text_encoder_config": {"width": 1}}')
    with pytest.raises(ValueError, match="must be a JSON object, or a file with one"):
        override_config(FlexiCodecARConfig(), "{hidden_size: 1}")
    with pytest.raises(ValueError, match="`vocab_size` must be at least 258"):
        train_text_tokenizer(iter(["a"]), 100, ["en"])


def test_a_latent_voicebox_speaks_in_the_codecs_own_scale(encoder, speech, device):
    statistics = encoder.latent_statistics(load_speech(speech))
    sizes = {"num_mel_bins": 32, "upsample_factor": 1, "semantic_hidden_size": 32, "codebook_size": 32768}
    torch.manual_seed(0)
    model = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**VOICEBOX | sizes | statistics)).to(device).eval()
    batch = batch_of(encoder, load_speech(speech).select(range(2)))
    inputs = {name: batch[name] for name in CODEC_INPUTS}
    encoded = encoder.codec.encode(**inputs, merging_threshold=0.86, num_quantizers=1)
    frames = encoder.codec.encode(**inputs, merging_threshold=1.0)
    latents, lengths = frames.latents.transpose(1, 2), encoded.token_lengths
    assert torch.equal(frames.token_lengths.sum(dim=1), lengths.sum(dim=1))

    # Training sees the latents with mean 0 and deviation 1 in each channel.
    mean, std = (torch.tensor(statistics[name], device=device) for name in ("latent_mean", "latent_std"))
    options = {"audio_codes": encoded.audio_codes[:, 0], "token_lengths": lengths, "mel_mask": frames.audio_codes_mask}
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    drawn = {"noise": noise, "timesteps": torch.full((2,), 0.3, device=device)}
    none = torch.zeros(2, dtype=torch.long, device=device)
    loss = model(labels=latents, prompt_lengths=none, **options, **drawn).flow_loss
    noisy = (1 - 0.3 * (1 - 1e-5)) * noise + 0.3 * (latents - mean) / std
    # Without a prompt, training hides the codes too.
    velocity = model(noisy_mel=noisy, timesteps=drawn["timesteps"], mel_mask=frames.audio_codes_mask).velocity
    error = (velocity - ((latents - mean) / std - (1 - 1e-5) * noise)).abs().mean(dim=-1)[frames.audio_codes_mask]
    assert_close(loss, error.mean().cpu(), atol=1e-5)

    prompt = {"prompt_codes": encoded.audio_codes[:, 0], "prompt_token_lengths": lengths, "prompt_mel": latents}
    output = model.sample(
        encoded.audio_codes[:, 0],
        lengths,
        **prompt,
        num_inference_steps=2,
        guidance_scale=0.0,
        noise=torch.zeros_like(latents),
    )
    assert output.mel.shape == latents.shape
    audio = encoder.codec.decode(latents=output.mel.transpose(1, 2), audio_codes_mask=output.mel_mask)
    assert torch.equal(audio.padding_mask.sum(dim=1), lengths.sum(dim=1) * 1280 - 16)


def test_one_process_does_not_take_two_gpus(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    model = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**MEL_VOICEBOX))
    with pytest.raises(ValueError, match="There are 2 GPUs, and one process: start one for each"):
        TTSTrainer(model, args, prepare=None)


def test_a_save_that_is_killed_leaves_the_model_before_it(tmp_path, monkeypatch):
    args = SpeechTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**MEL_VOICEBOX))
    trainer = TTSTrainer(model, args, prepare=None)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() >= {"config.json", "model.safetensors"}
    save = model.save_pretrained

    def killed(folder, **kwargs):
        save(folder, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", killed)
    with torch.no_grad():
        next(model.parameters()).zero_()
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_clips_of_like_length_share_a_batch(tmp_path):
    lengths = list(range(64))
    args = SpeechTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=4,
    )
    model = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**MEL_VOICEBOX))
    dataset = Dataset.from_dict({"length": lengths})
    trainer = TTSTrainer(model, args, train_dataset=dataset, prepare=None)
    sampler = trainer._get_train_sampler()
    assert type(sampler.lengths) is np.ndarray  # a column of `datasets` would be read from its file at each comparison
    order = [index for _, index in sampler]
    assert sorted(order) == lengths
    spread = [max(order[i : i + 4]) - min(order[i : i + 4]) for i in range(0, 64, 4)]
    assert sorted(spread)[8] < 20  # of 64, half of the batches


def test_latent_statistics_must_fit_the_model():
    for statistics, message in (
        ({"latent_mean": [0.0] * 32}, "both have `num_mel_bins` .32. values, .* got 32 and None"),
        ({"latent_mean": [0.0] * 32, "latent_std": [1.0]}, "got 32 and 1"),
        ({"latent_mean": [0.0] * 32, "latent_std": [1.0] * 31 + [0.0]}, "must be positive, but its minimum is 0.0"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            FlexiCodecVoiceboxConfig(**VOICEBOX, num_mel_bins=32, **statistics)


def test_what_is_drawn_for_an_item_does_not_depend_on_its_batch(device):
    model = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**MEL_VOICEBOX)).to(device)

    def draw(*items):
        frames = torch.tensor([frames for frames, _ in items], device=device)
        return model.draw_flow(frames, [torch.Generator(device).manual_seed(seed) for _, seed in items])

    both, alone = draw((9, 1), (40, 2)), draw((40, 2))
    for name in ("timesteps", "prompt_lengths", "noise"):
        assert torch.equal(both[name][1:], alone[name])
    assert both["noise"].shape == (2, 40, 16) and not both["noise"][0, 9:].any() and both["noise"][0, :9].all()
    assert both["timesteps"].min() > 0 and both["timesteps"].max() < 1


def test_semantic_frames_are_those_that_decide_the_merging(encoder, speech, device):
    batch = batch_of(encoder, load_speech(speech).select([0, 7]))
    encoded = encoder.codec.encode(**{name: batch[name] for name in CODEC_INPUTS}, num_quantizers=1)
    frames = encoder.codec.get_semantic_frames(batch["input_features"], batch["input_features_mask"])
    similarity = torch.nn.functional.cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1)
    assert_close(similarity * (encoded.frame_similarities != 0), encoded.frame_similarities.cpu(), atol=1e-6)
    lengths = encoded.token_lengths.sum(dim=1)
    assert frames.shape == (2, lengths.max(), 32) and not frames[0, lengths[0] :].any()
