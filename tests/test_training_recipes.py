"""The training scripts in `examples/` on recorded clips: a few steps, interruptions, two processes."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, HfArgumentParser

from conftest import AUDIO, assert_close
from flexicodec_hf import FlexiCodecModel, FlexiCodecVocoderModel
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.conversion import CheckpointError, convert_codec
from flexicodec_hf.data.files import DataError, only_run
from flexicodec_hf.training import batches, teacher
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC


EXAMPLES = Path(__file__).parent.parent / "examples"
CODEC = {
    "hidden_size": 16,
    "encoder_hidden_size": 2,
    "decoder_hidden_size": 32,
    "aggregator_hidden_size": 16,
    "aggregator_intermediate_size": 16,
    "num_aggregator_layers": 1,
    "num_aggregator_attention_heads": 2,
    "convnext_hidden_size": 16,
    "convnext_intermediate_size": 16,
    "num_convnext_layers": 1,
    "num_quantizers": 3,
    "codebook_size": 16,
    "bottleneck_hidden_size": 16,
    "bottleneck_intermediate_size": 16,
    "num_bottleneck_layers": 1,
    "num_bottleneck_attention_heads": 2,
}
VOCODER = {
    "num_mel_bins": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "n_fft": 320,
    "hop_length": 80,
    "sampling_rate": 16_000,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four recorded sentences."""
    folder = tmp_path_factory.mktemp("data")
    lines = (AUDIO / "metadata.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["file_name"].startswith("librivox_austen")]
    with (folder / "metadata.jsonl").open("w") as file:
        for row in sorted(rows, key=lambda row: row["seconds"]):  # the first, and so the shortest, is evaluated
            file.write(json.dumps({"file_name": str(AUDIO / row["file_name"]), "text": row["text"]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(data):
    """Runs a script of `examples/` in this process."""
    sys.path.insert(0, str(EXAMPLES))

    def run(script, output_dir, *options):
        importlib.import_module(script).main([str(argument) for argument in (*common(data, output_dir), *options)])
        return log_history(output_dir)

    yield run
    sys.path.remove(str(EXAMPLES))


def common(data, output_dir):
    return ("--dataset", data, "--eval_split", "train", "--output_dir", output_dir, "--logging_steps", 1)


def log_history(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def steps(rows):
    """The logs of steps and evaluations, without times."""
    timing = ("runtime", "_per_second")
    rows = [{name: value for name, value in row.items() if not name.endswith(timing)} for row in rows]
    return [row for row in rows if "loss" in row or any(name.startswith("eval_") for name in row)]


SEMANTIC_OPTIONS = (
    *("--hidden_size", 16, "--intermediate_size", 16, "--num_hidden_layers", 1, "--num_attention_heads", 2),
    *("--vocab_size", 40, "--per_device_train_batch_size", 2, "--num_eval_examples", 2, "--report_to", "none"),
    *("--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 3, "--disable_tqdm", "true"),
    *("--use_cpu", "--warmup_steps", 1, "--save_steps", 100),
)


@pytest.fixture(scope="module")
def semantic_encoder(run, tmp_path_factory):
    """Its folder, and what was logged."""
    folder = tmp_path_factory.mktemp("semantic")
    return folder, run("train_semantic_encoder", folder, *SEMANTIC_OPTIONS, "--do_eval")


@pytest.fixture(scope="module")
def codec_options(semantic_encoder, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "codec.json"
    config.write_text(json.dumps(CODEC))
    return (
        *("--config_overrides", config, "--semantic_encoder", semantic_encoder[0]),
        *("--per_device_train_batch_size", 2, "--crop_s", 0.48, "--num_eval_examples", 1, "--eval_steps", 100),
        *("--discriminator_start", 2, "--discriminator_size", 1, "--fixed_rate_steps", 1),
    )


@pytest.fixture(scope="module")
def codec(run, codec_options, tmp_path_factory):
    """Its folder, and what was logged."""
    folder = tmp_path_factory.mktemp("codec")
    rows = run("train_codec", folder, *codec_options, "--max_steps", 4, "--learning_rate", 0.001)
    return folder, rows


def test_semantic_encoder(semantic_encoder):
    folder, rows = semantic_encoder
    assert [row["step"] for row in steps(rows)] == [1, 2, 3, 3]
    assert {"eval_loss", "eval_wer", "eval_cer"} <= steps(rows)[-1].keys()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor(read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform, 16_000, return_tensors="pt")
    assert features.input_features.std().item() == pytest.approx(1, abs=0.3)  # normalized by what it was trained on


class FakeWhisper:
    """Hears 20 bands of loudness."""

    n_mels = 80

    def encode(self, features, to_cpu):
        bands = np.asarray(features)[:, :20, ::2]
        return bands.transpose(0, 2, 1)


@pytest.fixture
def whisper(monkeypatch):
    """CTranslate2, without a model."""
    storage = SimpleNamespace(from_array=np.asarray)
    module = SimpleNamespace(models=SimpleNamespace(Whisper=lambda *_, **__: FakeWhisper()), StorageView=storage)
    monkeypatch.setattr(teacher, "require", lambda *_: module)
    return module


def test_semantic_encoder_learns_from_a_teacher(run, data, whisper, monkeypatch, tmp_path):
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[2]["text"] = None
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(batches, "CLIPS_PER_FILE", 3)
    options = (*SEMANTIC_OPTIONS, "--do_eval", "--dropout", 0, "--dataset", tmp_path / "speech")
    options += ("--teacher", "whisper", "--teacher_cache", tmp_path / "states")
    options += ("--similarity_rates", 0.91, 8.3, 0.86, 6.25)
    expected = steps(run("train_semantic_encoder", tmp_path / "whole", *options))
    for row in expected[:3]:
        assert row["loss"] == pytest.approx(row["ctc"] + row["teacher"] + row["similarity"], rel=1e-3)
    assert {"eval_ctc", "eval_teacher", "eval_similarity", "eval_wer"} <= expected[-1].keys()

    encoder = SemanticEncoderForCTC.from_pretrained(tmp_path / "whole")
    calibrated = SemanticEncoderForCTC.from_pretrained(tmp_path / "whole" / "calibrated")
    changed = {
        name for name, weight in encoder.state_dict().items() if not weight.equal(calibrated.state_dict()[name])
    }
    norm = "encoder.layers.0.final_layernorm"
    assert changed == {f"{norm}.weight", f"{norm}.bias", "ctc_head.weight", "ctc_head.bias"}
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "whole" / "calibrated").cmvn_shift

    monkeypatch.setattr(teacher, "require", None)  # what is kept is not heard again
    for _ in range(3):
        rows = run("train_semantic_encoder", tmp_path / "parts", *options, "--time_limit", 0)
    assert steps(rows) == expected


def test_spectra_are_warped(run):
    warp = importlib.import_module("train_semantic_encoder").warp_spectrum
    features = torch.arange(8.0).repeat(1, 2)  # two frames of eight bands
    assert_close(warp(features, 1.0, 8), features)
    assert_close(warp(features, 0.5, 8), (torch.arange(8.0) / 2).repeat(1, 2))
    assert_close(warp(features, 1.5, 8), (torch.arange(8.0) * 1.5).clamp(max=7).repeat(1, 2))


def test_semantic_encoder_says_what_it_needs(run, tmp_path):
    with pytest.raises(ValueError, match="`--similarity_rates` needs `--do_eval`"):
        run("train_semantic_encoder", tmp_path, "--similarity_rates", 0.91, 8.3, 0.86, 6.25)
    with pytest.raises(ValueError, match=r"such as 0.91 8.3 0.86 6.25, got \[0.91, 8.3\]"):
        run("train_semantic_encoder", tmp_path, "--similarity_rates", 0.91, 8.3)
    with pytest.raises(ValueError, match="`--teacher` hears the data before the training"):
        run("train_semantic_encoder", tmp_path, "--teacher", "whisper", "--streaming")


def test_curves_of_trainings(semantic_encoder, codec, tmp_path):
    plot = importlib.import_module("plot_training")
    history = [{"step": 1, "loss": 2.0, "epoch": 0.5}, {"step": 1, "eval_loss": 3.0}, {"step": 1, "train_runtime": 9}]
    (tmp_path / "ar").mkdir()
    (tmp_path / "ar" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert plot.read_curves(tmp_path / "ar") == {"loss": {"train": [(1, 2.0)], "validation": [(1, 3.0)]}}
    assert [step for step, _ in plot.read_curves(semantic_encoder[0])["loss"]["train"]] == [1, 2, 3]
    folders = [semantic_encoder[0], codec[0], tmp_path / "ar"]
    plot.main([*map(str, folders), "-o", str(tmp_path / "curves.svg")])
    picture = (tmp_path / "curves.svg").read_text()
    for title in (f"{semantic_encoder[0].name}: wer", f"{codec[0].name}: mel_merged_semantic", "ar: loss"):
        assert title in picture


def test_codec_hears_other_voices(run, codec, codec_options, tmp_path):
    rows = run("train_codec", tmp_path, *codec_options, "--max_steps", 1, "--vary_voices")
    assert rows[0]["mel"] > 0 and rows[0]["mel"] != codec[1][0]["mel"]


def test_a_new_codec_does_not_say_where_its_encoder_was(codec, semantic_encoder):
    assert str(semantic_encoder[0]) not in (codec[0] / "config.json").read_text()


def test_a_codec_can_be_tuned_without_changing_its_tokens(run, codec, tmp_path):
    options = (
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--crop_s",
        0.48,
        "--num_eval_examples",
        1,
        "--eval_steps",
        100,
    )
    options += ("--model_name_or_path", codec[0], "--keep_tokens", "--discriminator_start", 9)
    run("train_codec", tmp_path, *options, "--learning_rate", 0.01, "--ema_decay", 0.5)
    before, after = (load_file(folder / "model.safetensors") for folder in (codec[0], tmp_path))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"bottleneck", "acoustic_decoder"}


def test_interrupted_semantic_encoder_resumes_to_the_same_losses(run, semantic_encoder, tmp_path):
    options = (*SEMANTIC_OPTIONS, "--do_eval", "--time_limit", 0)  # a step a run
    for _ in range(2):
        run("train_semantic_encoder", tmp_path, *options)
    assert steps(run("train_semantic_encoder", tmp_path, *options)) == steps(semantic_encoder[1])


def test_codec(codec, semantic_encoder):
    folder, rows = codec
    losses = [row for row in rows if "loss" in row]
    assert losses[0]["tokens_per_second"] == 12.5  # nothing merged in the first step
    assert [("discriminator" in row) for row in losses] == [False, False, True, True]
    assert {"eval_mel_all_quantizers", "eval_mel_semantic", "eval_mel_merged"} <= steps(rows)[-1].keys()
    assert {path.name for path in (folder / "samples" / "step-00000004").iterdir()} >= {
        "original.flac",
        "semantic.flac",
        "spectrograms.png",
    }

    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, FlexiCodecModel)
    assert model.config.merging_threshold_range == [0.85, 1.0]
    weights = load_file(semantic_encoder[0] / "model.safetensors")
    for name, parameter in model.semantic_encoder.named_parameters():
        assert torch.equal(parameter, weights[f"encoder.{name}"]), name  # frozen


def test_losses_of_the_codec_are_weighted_as_published(codec):
    weights = {"mel": 15, "commitment": 0.25, "codebook": 1, "distillation": 15, "adversarial": 1, "feature": 2}
    for row in codec[1][:4]:
        expected = sum(weight * row.get(name, 0) for name, weight in weights.items())
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_interrupted_codec_resumes_to_the_same_losses(run, codec, codec_options, tmp_path):
    options = (*codec_options, "--max_steps", 4, "--learning_rate", 0.001, "--time_limit", 0)
    for _ in range(3):
        run("train_codec", tmp_path, *options)
    assert steps(run("train_codec", tmp_path, *options)) == steps(codec[1])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    expected = load_file(codec[0] / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_codec_starts_from_a_codec_and_a_stream(run, codec, tmp_path):
    rows = run(
        *(
            "train_codec",
            tmp_path,
            "--model_name_or_path",
            codec[0],
            "--max_steps",
            1,
            "--per_device_train_batch_size",
            2,
        ),
        *("--crop_s", 0.48, "--num_eval_examples", 1, "--discriminator_start", 1, "--learning_rate", 0, "--streaming"),
    )
    expected = steps(codec[1])[-1]["eval_mel_all_quantizers"]
    assert steps(rows)[-1]["eval_mel_all_quantizers"] == pytest.approx(expected, rel=1e-5)


def test_a_run_that_was_killed_while_it_saved_is_repaired(run, codec, codec_options, tmp_path):
    """Killed in the last save: one checkpoint is cut off, another is whole, but the model is still an older one."""
    folder, partial = tmp_path / "codec", tmp_path / "codec" / "checkpoint-5"
    shutil.copytree(codec[0], folder)
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half of it")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, folder / "model.safetensors")
    assert steps(run("train_codec", folder, *codec_options, "--max_steps", 4)) == steps(codec[1])
    assert not partial.exists()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name


STEP_5 = ("--max_steps", 5, "--learning_rate", 0.001)


@pytest.fixture(scope="module")
def continued_codec(run, codec, codec_options, tmp_path_factory):
    """`codec` after one more step: its folder, and what was logged."""
    folder = tmp_path_factory.mktemp("continued") / "codec"
    shutil.copytree(codec[0], folder)
    return folder, run("train_codec", folder, *codec_options, *STEP_5)


@pytest.mark.parametrize("moment", ["checkpoint-5", "codec/model.safetensors"])
def test_a_run_killed_at_a_rename_of_its_last_save_is_repaired(
    run, data, codec, continued_codec, codec_options, tmp_path, moment
):
    folder, options = tmp_path / "codec", (*codec_options, *STEP_5)
    shutil.copytree(codec[0], folder)
    script = f"""
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and os.fspath(arguments[1]).endswith({moment!r}):
        os.kill(os.getpid(), signal.SIGKILL)
import torch
torch.set_num_threads({torch.get_num_threads()})
import train_codec, flexicodec_hf.training.gan as gan
save = gan.GANTrainer._save
gan.GANTrainer._save = lambda self, *args: (sys.addaudithook(hook), save(self, *args))
train_codec.main(sys.argv[1:])
"""
    arguments = [str(argument) for argument in (*common(data, folder), *options)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], cwd=EXAMPLES, timeout=300)
    assert killed.returncode == -signal.SIGKILL

    weights, before = folder / "model.safetensors", load_file(codec[0] / "model.safetensors")
    assert all(torch.equal(weight, before[name]) for name, weight in load_file(weights).items())

    assert steps(run("train_codec", folder, *options)) == steps(continued_codec[1])
    expected = load_file(continued_codec[0] / "model.safetensors")
    assert not all(torch.equal(weight, before[name]) for name, weight in expected.items())
    assert all(torch.equal(weight, expected[name]) for name, weight in load_file(weights).items())
    assert not list(folder.rglob(".*"))


def test_too_few_clips_for_a_batch_are_refused(run, codec_options, tmp_path):
    with pytest.raises(ValueError, match="There are 4 clips to train on, fewer than a batch, 5"):
        run("train_codec", tmp_path, *codec_options, "--per_device_train_batch_size", 5)


def test_a_second_training_in_a_folder_is_refused(run, codec, codec_options):
    with only_run(codec[0]), pytest.raises(DataError, match="another run works in this directory"):
        run("train_codec", codec[0], *codec_options, "--max_steps", 4)


def test_codec_starts_from_a_codec_of_a_fixed_rate(run, golden, tmp_path):
    """A file that lacks what makes the rate dynamic, as DualCodec's does."""
    fixture = golden("codec_tiny")
    weights = {
        name: weight for name, weight in fixture.weights.items() if not re.match("bottleneck|.*aggregator", name)
    }
    save_file(weights, tmp_path / "start.safetensors")
    (tmp_path / "start.yaml").write_text(json.dumps({"model": fixture.spec["config"]}))
    with pytest.raises(CheckpointError, match=r"no query token aggregator .* with `allow_partial=True`"):
        convert_codec(tmp_path / "start.safetensors", tmp_path / "start", tmp_path / "start.yaml")
    convert_codec(tmp_path / "start.safetensors", tmp_path / "start", tmp_path / "start.yaml", allow_partial=True)
    run(
        *(
            "train_codec",
            tmp_path / "codec",
            "--model_name_or_path",
            tmp_path / "start",
            "--max_steps",
            1,
            "--per_device_train_batch_size",
            2,
        ),
        *("--crop_s", 0.48, "--num_eval_examples", 0, "--discriminator_start", 1, "--learning_rate", 0),
    )
    model = FlexiCodecModel.from_pretrained(tmp_path / "codec")
    assert_close(model.acoustic_decoder.conv1.bias, weights["dac.decoder.model.0.bias"])
    assert model.bottleneck.layers[0].fc1.weight.std() > 0


def test_codec_says_what_it_can_start_from(run, tmp_path):
    with pytest.raises(ValueError, match="pass --model_name_or_path, or --semantic_encoder, or both"):
        run("train_codec", tmp_path)
    with pytest.raises(ValueError, match="--config_overrides needs --semantic_encoder"):
        run("train_codec", tmp_path, "--model_name_or_path", "a", "--config_overrides", "{}")
    for options in (("--semantic_encoder", "a"), ("--semantic_encoder", "a", "--model_name_or_path", "b")):
        with pytest.raises(ValueError, match="--keep_tokens needs --model_name_or_path alone"):
            run("train_codec", tmp_path, *options, "--keep_tokens")


def test_a_codec_gets_another_semantic_encoder(run, codec, semantic_encoder, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(semantic_encoder[0], encoder)
    weights = load_file(encoder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
    options = ("--max_steps", 1, "--per_device_train_batch_size", 2, "--crop_s", 0.48, "--num_eval_examples", 0)
    options += ("--model_name_or_path", codec[0], "--semantic_encoder", encoder, "--discriminator_start", 9)
    options += ("--config_overrides", '{"merging_threshold": 0.7}')
    run("train_codec", tmp_path / "codec", *options, "--learning_rate", 0)
    config = FlexiCodecModel.from_pretrained(tmp_path / "codec").config
    assert (config.hidden_size, config.merging_threshold) == (CODEC["hidden_size"], 0.7)
    before, after = (load_file(folder / "model.safetensors") for folder in (codec[0], tmp_path / "codec"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"semantic_encoder", "semantic_query_embedding"}


def test_codec_trains_in_mixed_precision(codec, device):
    """The quantizers choose in float32 even then."""
    model = FlexiCodecModel.from_pretrained(codec[0]).to(device)
    extractor = AutoFeatureExtractor.from_pretrained(codec[0])
    waveform = read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform
    inputs = extractor([waveform[:20_000], waveform[:12_000]], sampling_rate=16_000, return_tensors="pt").to(device)
    calls = []
    for quantizer in model.acoustic_quantizer.quantizers:
        quantizer.register_forward_hook(lambda module, arguments, output: calls.append((module, arguments, output[0])))
    with torch.autocast(device, torch.bfloat16):
        output = model(**inputs, merging_threshold=0.9)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for quantizer, (hidden_states, *entries), projected in list(calls):
        assert torch.equal(quantizer(hidden_states.float(), *entries)[0], projected)


def test_two_processes_give_the_losses_of_one(run, data, codec, codec_options, tmp_path):
    options = (*codec_options, "--max_steps", 4, "--learning_rate", 0.001)
    arguments = (*common(data, tmp_path), *options, "--per_device_train_batch_size", 1)
    # `--cpu` would start one process, whatever the number.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    command = [sys.executable, *launch.split(), EXAMPLES / "train_codec.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([str(part) for part in command], check=True, env=environment)
    states = (tmp_path / "checkpoint-4").glob("rng_state_*")
    assert {path.name for path in states} == {"rng_state_0.pth", "rng_state_1.pth"}
    # Sums are taken in another order, and the discriminators amplify it from step to step.
    for row, expected in zip(steps(log_history(tmp_path)), steps(codec[1]), strict=True):
        assert row["loss" if "loss" in row else "eval_mel_all_quantizers"] == pytest.approx(
            expected["loss" if "loss" in row else "eval_mel_all_quantizers"], rel=1e-4
        )


def documented_commands():
    pages = ("docs/training.md", "docs/training_tts.md", "checkpoints/flexicodec-tiny/README.md")
    text = "\n".join((EXAMPLES.parent / page).read_text() for page in pages).replace("\\\n", " ")
    return re.findall(r"^[^`\n]*examples/(train_\w+)\.py (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("script", "options"), documented_commands())
def test_documented_options_exist(script, options, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module(script)
    parsed = []

    class Parsed(Exception):
        pass

    def parse(*classes, argv):
        parsed.append(HfArgumentParser(classes).parse_args(argv))
        raise Parsed

    monkeypatch.setattr(module, "parse_arguments", parse)
    with pytest.raises(Parsed):
        module.main(shlex.split(options))
    assert parsed[0].dataset


def test_vocoder(run, tmp_path):
    config = tmp_path / "vocoder.json"
    config.write_text(json.dumps(VOCODER))
    options = (
        *(
            "--config_overrides",
            config,
            "--max_steps",
            3,
            "--per_device_train_batch_size",
            2,
            "--crop_s",
            0.3,
            "--num_eval_examples",
            1,
        ),
        *("--discriminator_start", 1, "--discriminator_size", 1, "--eval_steps", 100),
    )
    expected = run("train_vocoder", tmp_path / "whole", *options)
    assert "eval_mel" in steps(expected)[-1]
    for _ in range(3):
        rows = run("train_vocoder", tmp_path / "parts", *options, "--time_limit", 0)
    assert steps(rows) == steps(expected)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "whole"), FlexiCodecVocoderModel)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "whole")
    assert (extractor.feature_size, extractor.hop_length) == (20, 80)


def test_programs_that_speak(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("make_synthetic_speech")
    path = tmp_path / "a.wav"
    assert script.speech_command("Hello.", "slt", path)[:3] == ["flite", "-voice", "slt"]
    assert script.speech_command("Hello.", "espeak-ng:en-us+f2", path)[:3] == ["espeak-ng", "-v", "en-us+f2"]
    assert script.speech_command("Hello.", "festival:voice_kal_diphone", path)[2] == "(voice_kal_diphone)"
    assert (tmp_path / "a.txt").read_text() == "Hello."
    with pytest.raises(ValueError, match="must be flite, espeak-ng or festival, not 'mimic'"):
        script.speech_command("Hello.", "mimic:ap", path)


def test_synthetic_speech(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("make_synthetic_speech")
    lines = [
        '"It is a truth universally acknowledged," said Mr. Bennet--and then',
        "he slept. No!",
        "",
        "Chapter 1",
        "",
    ]
    assert list(script.sentences(iter(lines), min_words=4, max_words=24)) == [
        "It is a truth universally acknowledged, said Mister Bennet, and then he slept."
    ]
    assert list(script.sentences(iter(lines), min_words=3, max_words=8)) == []
    assert list(script.sentences(iter(lines), min_words=4, max_words=8, cut=True)) == [
        "It is a truth universally acknowledged.",
        "Said Mister Bennet, and then he slept.",
    ]
    spoken = []

    def flite(command, check):
        spoken.append(command[2])
        script.soundfile.write(command[-1], [0.0] * 16_000, 16_000)

    monkeypatch.setattr(script.subprocess, "run", flite)
    book = tmp_path / "book.txt"
    letters = "abcdefghijklmnopqrst"
    book.write_text("\n\n".join(f"This is the letter {letter}." for letter in letters))
    arguments = ["--text", str(book), "--output-dir", str(tmp_path / "speech"), "--held-out-minutes", "0.03"]
    script.main([*arguments, "--hours", "0.001"])
    script.main([*arguments, "--hours", "0.002"])
    texts = {}
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tmp_path / "speech" / split / "metadata.jsonl").read_text().splitlines()]
        assert sum(row["seconds"] for row in rows) == {"train": 8, "validation": 2, "test": 2}[split]
        assert all((tmp_path / "speech" / split / row["file_name"]).exists() for row in rows)
        texts[split] = {row["text"] for row in rows}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert {"kal16", "slt", "rms", "awb"} <= set(spoken)
