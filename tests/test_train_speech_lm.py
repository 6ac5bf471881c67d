"""The example trains, resumes, measures and speaks; so do the commands that the docs show."""

import math
import random
import re
import runpy
import shlex

import pytest
import soundfile
import torch
from transformers import EvalPrediction

from conftest import TESTS
from flexicodec_hf.speech_lm import SpeechTextCollator
from test_collators import make, make_rows


datasets = pytest.importorskip("datasets")

EXAMPLE = TESTS.parent / "examples" / "train_speech_lm.py"
QUICK = [
    "--hidden_size",
    "16",
    "--num_hidden_layers",
    "1",
    "--per_device_train_batch_size",
    "4",
    "--learning_rate",
    "3e-2",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "3",
    "--prompt_seconds",
    "0.3",
    "--max_new_seconds",
    "0.5",
]


@pytest.fixture(scope="module")
def workplace(codec_dir, tmp_path_factory):
    """A directory with a codec, and with tokens that can be learned: every clip says the same."""
    folder = tmp_path_factory.mktemp("speech_lm")
    (folder / "flexicodec").symlink_to(codec_dir())
    rng = random.Random(0)
    codes, lengths = [rng.randrange(32_768) for _ in range(12)], [rng.randint(1, 8) for _ in range(12)]
    row = {
        "audio_codes": [codes],
        "token_lengths": lengths,
        "text": "so",
        "frame_rate": 12.5,
        "duration": sum(lengths) / 12.5,
    }
    (folder / "tokens").mkdir()
    rows = [*[row] * 12, row | {"duration": 100.0}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "tokens" / "train-00000.parquet")
    return folder


@pytest.fixture
def example(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return runpy.run_path(str(EXAMPLE))


def run(example: dict, *arguments: str) -> dict[str, float]:
    return example["main"]([*arguments, *QUICK])


def test_speaks_through_the_voice_stage(example, tts_repository):
    arguments = example["SpeechArguments"](tokens="tokens", codec="flexicodec", voice_stage=str(tts_repository))
    waveform, sampling_rate = example["speak"](torch.tensor([[3, 1, 4, 1]]), torch.tensor([2, 1, 3, 4]), arguments)
    assert sampling_rate == 24_000
    assert waveform.shape == (10 * 24_000 * 80 // 1000,)  # ten frames of 80 ms
    assert abs(waveform).max() > 0


def test_learns_and_goes_on_after_an_interruption(example, workplace, capsys):
    folder = workplace / "learns"
    common = ["--tokens", "tokens", "--codec", "flexicodec", "--output_dir", str(folder)]
    first = run(example, *common, "--max_steps", "6", "--save_steps", "3")
    output = capsys.readouterr().out
    assert "1 of 13 clips are longer than 30.0 s and left out" in output
    assert "% of the durations right" in output and "The continuation: <|speech|>" in output
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", output)]
    assert len(losses) == 2 and losses[1] < losses[0]
    # Less than the 15 + 3 bits of a token that nothing is known of.
    raw = float(re.search(r"\(([\d.]+) without a model", output)[1])
    assert first["eval_bits_per_second"] < raw
    info = soundfile.info(folder / "continuation.wav")
    assert info.samplerate == 16_000 and info.duration > 0.2

    second = run(example, *common, "--max_steps", "16", "--save_steps", "3")
    assert second["eval_bits_per_second"] < 0.9 * first["eval_bits_per_second"]
    steps = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert {3, 6, 9, 16} <= steps
    assert "'epoch': '1'" not in capsys.readouterr().out  # it did not begin again


@pytest.mark.parametrize("layout", ["parallel", "separate", "joint"])
def test_metrics_count_bits_and_hits(example, layout):
    """Of a model that gives every id and duration the same chance, and one that is always right."""
    vocabulary = make(layout)
    batch = SpeechTextCollator(vocabulary, labels_on=("text", "speech"))(make_rows(vocabulary))
    metrics = example["SpeechMetrics"](vocabulary, frame_rate=12.5)
    labels, vocab_size = batch["labels"], len(vocabulary.tokenizer)
    durations = batch.get("duration_labels")
    seconds = sum(sum(row["token_lengths"]) for row in make_rows(vocabulary)) / 12.5
    num_speech = int(vocabulary.is_speech(labels).sum())
    num_tokens = int(vocabulary.is_code(labels).sum())

    for right in (False, True):
        logits = torch.zeros(*labels.shape, vocab_size)
        duration_logits = torch.zeros(*labels.shape, 8)
        if right:
            known = labels[:, 1:].clamp(min=0)
            logits[:, :-1].scatter_(2, known[..., None], 1000.0)
            if durations is not None:
                duration_logits.scatter_(2, (durations - 1).clamp(min=0)[..., None], 1000.0)
        outputs, targets = (
            ((logits, duration_logits), (labels, durations)) if durations is not None else (logits, labels)
        )
        scores = metrics.scores(outputs, targets)
        targets = tuple(t.numpy() for t in targets) if durations is not None else targets.numpy()
        result = metrics.compute(EvalPrediction(scores.numpy(), targets))
        assert result["seconds"] == pytest.approx(seconds)
        if right:
            assert result["bits_per_second"] == pytest.approx(0, abs=1e-4) and result["duration_accuracy"] == 1
        else:
            bits = num_speech * math.log2(vocab_size) + (num_tokens * 3 if durations is not None else 0)
            assert result["bits_per_second"] == pytest.approx(bits / seconds, rel=1e-4)


def test_commands_of_the_docs_run(example, workplace):
    text = (TESTS.parent / "docs" / "language_models.md").read_text()
    commands = re.findall(r"^\$ python examples/train_speech_lm.py (.*)$", text, flags=re.MULTILINE)
    assert commands
    for index, command in enumerate(commands):
        words = shlex.split(command)
        output_dir = words.index("--output_dir") + 1
        words[output_dir] += f"_{index}"
        result = run(example, *words, "--max_steps", "1")
        assert math.isfinite(result["eval_bits_per_second"])
        assert (workplace / words[output_dir] / "continuation.wav").exists()


def test_starts_from_a_pretrained_model(example, workplace):
    # Any causal language model: here one without a word of speech.
    vocabulary_free = example["make_tokenizer"]()
    vocabulary_free.save_pretrained("plain")
    config = example["LlamaConfig"](
        vocab_size=len(vocabulary_free),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    example["AutoModelForCausalLM"].from_config(config).save_pretrained("plain")
    common = ["--tokens", "tokens", "--codec", "flexicodec", "--model_name_or_path", "plain", "--max_steps", "1"]
    result = run(example, *common, "--output_dir", "from_plain")
    assert math.isfinite(result["eval_loss"])


def test_too_few_clips_are_an_error(example):
    with pytest.raises(SystemExit, match="tokens has 0 clips to use: at least 2 are needed"):
        run(example, "--tokens", "tokens", "--codec", "flexicodec", "--output_dir", "none", "--max_duration_s", "0.5")
