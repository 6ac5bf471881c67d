"""The recipe that distills a Voicebox, with tiny models on cuts of a recording."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor

from conftest import AUDIO
from flexicodec_hf import (
    FlexiCodecMelFeatureExtractor,
    FlexiCodecModel,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
)
from flexicodec_hf.audio_flexicodec import read_audio, write_audio
from flexicodec_hf.data.sources import load_speech
from flexicodec_hf.training.batches import with_seeds
from flexicodec_hf.training.tts import SpeechCollator, SpeechEncoder


SCRIPT = Path(__file__).parent.parent / "examples" / "distill_voicebox.py"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of 8 clips of 1 to 1.7 seconds."""
    folder = tmp_path_factory.mktemp("speech")
    waveform = read_audio(AUDIO / "librivox_long.flac", 16_000).waveform
    for clip in range(8):
        write_audio(folder / f"{clip}.wav", waveform[clip * 40_000 :][: 16_000 + 1600 * clip], 16_000)
    return folder


@pytest.fixture(scope="module", params=["mel", "latent"])
def teacher(request, codec_dir, tmp_path_factory):
    """A Voicebox of random weights, with norms that depend on the time, on disk."""
    codec = FlexiCodecModel.from_pretrained(codec_dir())
    values = {"num_mel_bins": 16, "repa_layer_index": 1, "repa_hidden_size": 32}
    if request.param == "latent":
        size = codec.config.hidden_size
        values = {"num_mel_bins": size, "upsample_factor": 1, "repa_layer_index": None}
        values |= {"latent_mean": [0.1] * size, "latent_std": [2.0] * size}
    torch.manual_seed(0)
    config = FlexiCodecVoiceboxConfig(**SIZES, **values, codebook_size=codec.config.semantic_codebook_size)
    model = FlexiCodecVoiceboxModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "to_weight.weight" in name:
                parameter.normal_(std=0.2)
        model.output_mlp.down_proj.weight *= 10
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    if request.param == "mel":
        FlexiCodecMelFeatureExtractor(feature_size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def batches_of(script, teacher, codec_dir, speech, **args):
    """What prepares batches, and a batch of four clips."""
    codec = FlexiCodecModel.from_pretrained(codec_dir())
    extractor = AutoFeatureExtractor.from_pretrained(codec_dir())
    model = FlexiCodecVoiceboxModel.from_pretrained(teacher).eval()
    latents = model.config.predicts_latent
    mel_extractor = None if latents else FlexiCodecMelFeatureExtractor(feature_size=16)
    encoder = SpeechEncoder(codec, extractor, [0.9, 1.0], latents=latents)
    arguments = script["ModelArguments"](codec="", teacher="", **args)
    clips = with_seeds(load_speech(str(speech)), 0)
    batch = SpeechCollator(extractor, mel_feature_extractor=mel_extractor)([clips[clip] for clip in range(4)])
    return script["DistillationBatches"](model, encoder, arguments), batch


@torch.no_grad()
def test_the_student_learns_the_mean_velocity_of_the_teachers_path(script, teacher, codec_dir, speech):
    batches, batch = batches_of(script, teacher, codec_dir, speech, student_steps=[2], teacher_steps=4)
    inputs, counts = batches(batch)
    clips, factor = batches.clips(batch), batches.teacher.config.upsample_factor
    path = batches.path(clips, 4, 2.0)
    assert not torch.equal(path, batches.path(clips, 4, 0.0))
    student, errors = batches.teacher, []
    assert set(inputs["timesteps"].tolist()) <= {0.25, 0.75}
    for item, time in enumerate(inputs["timesteps"].tolist()):
        step = round(2 * time - 0.5)
        prompt, end = (int(clips[name][item].sum()) * factor for name in ("prompt_frames", "has_code"))
        start, stop = (point[item, : end - prompt] for point in (path[2 * step], path[2 * step + 2]))
        mel = student._normalize(clips["mel"][item, :prompt])
        velocity = student(
            audio_codes=clips["codes"][item : item + 1, : end // factor],
            noisy_mel=torch.cat([mel, start])[None],
            timesteps=torch.tensor([time]),
        ).velocity[0, prompt:]
        errors.append((velocity - (stop - start) * 2).abs().mean(dim=-1))
    expected = torch.cat(errors)
    assert counts["flow_loss"] == len(expected)
    assert student(**inputs).flow_loss.item() == pytest.approx(expected.mean().item(), rel=1e-3)


@pytest.mark.parametrize("teacher", ["mel"], indirect=True)
def test_the_recipe_brings_few_steps_closer_and_resumes(script, teacher, codec_dir, speech, tmp_path, monkeypatch):
    if torch.backends.mps.is_available():
        pytest.skip("Trainer's random states are those of CPU and CUDA")

    def run(name, *changes):
        argv = [str(SCRIPT), "--codec", str(codec_dir()), "--teacher", str(teacher), "--dataset", str(speech)]
        argv += ["--output_dir", str(tmp_path / name), "--do_train", "--do_eval", "--num_eval_examples", "2"]
        argv += ["--teacher_steps", "4", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none"]
        argv += ["--disable_tqdm", "true", "--use_cpu", "true", "--per_device_train_batch_size", "6"]
        argv += ["--max_steps", "30", "--save_steps", "28", *changes]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    losses = run("whole")
    assert sum(losses[step] for step in range(21, 31)) < 0.9 * sum(losses[step] for step in range(1, 11))
    distances = json.loads((tmp_path / "whole" / "distances_results.json").read_text())
    batches, _ = batches_of(script, teacher, codec_dir, speech, teacher_steps=4)
    clips = with_seeds(load_speech(str(speech)), 0)
    student = FlexiCodecVoiceboxModel.from_pretrained(tmp_path / "whole").eval()
    collator = SpeechCollator(
        batches.encoder.feature_extractor,
        mel_feature_extractor=None
        if student.config.predicts_latent
        else FlexiCodecMelFeatureExtractor(feature_size=16),
    )
    batch = collator([clips[clip] for clip in range(8)])
    before, after = (batches.distances(model, batch) for model in (batches.teacher, student))
    # The random teacher's four steps without guidance are almost those with it already.
    for steps in (1, 2):
        assert after[f"student_{steps}_steps"] < before[f"student_{steps}_steps"]
        assert after[f"student_{steps}_steps"] < before[f"teacher_{steps}_steps"]
    assert distances.keys() == before.keys() and before["teacher_4_steps"] < 1e-6

    shutil.copytree(tmp_path / "whole" / "checkpoint-28", tmp_path / "resumed" / "checkpoint-28")
    assert [run("resumed")[step] for step in (29, 30)] == [losses[step] for step in (29, 30)]


def test_steps_that_do_not_fit_are_refused(script):
    arguments = script["ModelArguments"]
    with pytest.raises(ValueError, match=r"must be a multiple of each of .*, got 10 and \[4\]"):
        arguments(codec="", teacher="", student_steps=[4], teacher_steps=10)
    with pytest.raises(ValueError, match="steps with the same middle"):
        arguments(codec="", teacher="", student_steps=[1, 3], teacher_steps=12)
