"""What the training recipes are made of: data, losses, discriminators, averages."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Audio, Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig

from conftest import AUDIO, assert_close
from flexicodec_hf import FlexiCodecConfig
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.sources import decode_audio, load_speech
from flexicodec_hf.modeling_flexicodec import FlexiCodecAcousticDecoder, FlexiCodecAcousticEncoder, FlexiCodecSnake1d
from flexicodec_hf.training import teacher
from flexicodec_hf.training.batches import EpochSampler, random_crop, with_seeds
from flexicodec_hf.training.cpu import optimize_for_cpu_training
from flexicodec_hf.training.discriminators import Discriminators, PeriodDiscriminator
from flexicodec_hf.training.gan import MovingAverage
from flexicodec_hf.training.losses import (
    MultiScaleMelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    magnitudes,
)
from flexicodec_hf.training.samples import plot_spectrograms
from flexicodec_hf.training.semantic_encoder import (
    SemanticEncoderForCTC,
    best_paths,
    calibrate_similarities,
    decode_ctc,
    similarity_spread_loss,
    teacher_loss,
    train_tokenizer,
)
from flexicodec_hf.training.trainer import last_checkpoint


CLIP = AUDIO / "librivox_austen_0880.flac"
TEXT = "he was not an ill disposed young man"


def the_clip(dataset):
    """The row of CLIP."""
    return next(row for row in dataset if "0880" in row["audio"]["path"])


def parquet(path, audio_column="audio"):
    rows = {audio_column: [{"path": CLIP.name, "bytes": CLIP.read_bytes()}], "sentence": [TEXT]}
    dataset = Dataset.from_dict(rows).cast_column(audio_column, Audio(decode=False))
    dataset.to_parquet(path / "data" / "train-00000-of-00001.parquet")


def test_loads_a_folder_with_metadata():
    dataset = load_speech(AUDIO)
    assert len(dataset) == len((AUDIO / "metadata.jsonl").read_text().splitlines())
    row = the_clip(dataset)
    assert (row["text"], row["speaker"]) == (TEXT, "librivox-austen")
    expected, rate = soundfile.read(CLIP, dtype="float32")
    np.testing.assert_array_equal(decode_audio(row["audio"], rate), expected)


def test_loads_the_split_of_a_folder(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n{CLIP},{split}\n")
    assert load_speech(tmp_path, split="validation")[0]["text"] == "validation"
    assert [row["text"] for row in load_speech(AUDIO, split="train[1:2]")] == [TEXT]


def test_loads_a_manifest_of_any_name(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"wav": str(CLIP), "words": TEXT}) + "\n")
    dataset = load_speech(tmp_path / "list.jsonl", audio_column="wav", text_column="words")
    assert dataset[0] == {"text": TEXT, "audio": {"path": str(CLIP), "bytes": None}, "id": CLIP.name}


def test_loads_a_folder_without_metadata(tmp_path):
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "a.wav", np.zeros(100), 16_000)
    (tmp_path / "notes.txt").write_text("no audio")
    assert [row["audio"]["path"] for row in load_speech(tmp_path)] == [str(tmp_path / "deep" / "a.wav")]


@pytest.mark.parametrize("streaming", [False, True])
def test_loads_a_dataset(tmp_path, streaming):
    parquet(tmp_path, audio_column="speech")
    dataset = load_speech(tmp_path, streaming=streaming, audio_column="speech", text_column="sentence")
    row = next(iter(dataset))
    assert row["text"] == TEXT
    assert len(decode_audio(row["audio"], 16_000)) == soundfile.info(CLIP).frames


def test_names_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"there are no audio files in this folder, no metadata"):
        load_speech(tmp_path)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(100), 16_000)
    assert len(load_speech(tmp_path, split="train[:1]")) == 1
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub")
    with pytest.raises(DataError, match=r"no column 'text_en' among .'audio', 'sentence'."):
        load_speech(tmp_path / "hub", text_column="text_en")
    with pytest.raises(DataError, match="no column 'wav'"):
        load_speech(tmp_path / "hub", audio_column="wav")


def test_decodes_to_one_channel_at_the_rate_asked():
    waveform = decode_audio({"path": str(AUDIO / "stereo_44k.flac"), "bytes": None}, 16_000)
    info = soundfile.info(AUDIO / "stereo_44k.flac")
    assert waveform.ndim == 1 and abs(len(waveform) - info.duration * 16_000) < 2
    with pytest.raises(ValueError, match=r"broken\.wav: not an audio file"):
        decode_audio({"path": "broken.wav", "bytes": b"nothing"}, 16_000)


def test_crops_at_random_places():
    waveform = np.arange(10)
    starts = set()
    for seed in range(50):
        crop = random_crop(waveform, 4, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, np.arange(crop[0], crop[0] + 4))
        starts.add(int(crop[0]))
    assert starts == set(range(7))
    np.testing.assert_array_equal(random_crop(waveform, 20, np.random.default_rng(0)), waveform)


def names_and_numbers(examples):
    return [(example["name"], np.random.default_rng(example["seed"]).random()) for example in examples]


def batches(dataset, num_epochs, size, *, process=0, num_processes=1, skip=0, num_workers=0):
    """The batches of some epochs, as `SpeechTrainer` reads them; the first epoch from the batch `skip` on."""
    sampler = None if isinstance(dataset, IterableDataset) else EpochSampler(len(dataset), 3)
    dataset = with_seeds(dataset, 3)
    loader = DataLoader(
        dataset, size, sampler=sampler, collate_fn=names_and_numbers, drop_last=True, num_workers=num_workers
    )
    loader = prepare_data_loader(loader, num_processes=num_processes, process_index=process, dispatch_batches=False)
    epochs = []
    for epoch in num_epochs if isinstance(num_epochs, list) else range(num_epochs):
        loader.set_epoch(epoch)
        epochs.append(list(skip_first_batches(loader, skip if not epochs else 0)))
    return epochs


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_processes_or_interruptions(streaming):
    dataset = Dataset.from_dict({"name": list("abcdefghijk")})
    if streaming:
        dataset = dataset.to_iterable_dataset().shuffle(seed=3, buffer_size=1000)
    whole = batches(dataset, 4, 4)
    assert [len(epoch) for epoch in whole] == [2] * 4
    assert len({name for batch in whole[0] for name, _ in batch}) == 8
    assert whole[0][0] != whole[1][0]  # another order, or another crop, in the next epoch

    parts = [batches(dataset, 4, 2, process=process, num_processes=2) for process in range(2)]
    assert [
        [first + second for first, second in zip(*epoch, strict=True)] for epoch in zip(*parts, strict=True)
    ] == whole

    assert batches(dataset, [2, 3], 4, skip=1) == [whole[2][1:], whole[3]]
    resumed = [batches(dataset, [2, 3], 2, process=process, num_processes=2, skip=1) for process in range(2)]
    assert resumed == [[part[2][1:], part[3]] for part in parts]


def test_batches_do_not_depend_on_workers():
    dataset = Dataset.from_dict({"name": list("abcdefghijk")})
    assert batches(dataset, 2, 4, num_workers=1) == batches(dataset, 2, 4)


def test_batches_of_about_the_same_length():
    sampler = EpochSampler(9, 3, lengths=[7, 1, 5, 3, 8, 2, 6, 4, 9], batch_size=2)
    orders = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        assert sorted(order) == list(range(9)) and list(sampler) == [(epoch, index) for index in order]
        lengths = sampler.lengths[order].tolist()
        ranks = np.argsort(np.argsort(lengths[:8])).reshape(4, 2)  # without the last one, which is alone
        assert sorted(map(sorted, ranks.tolist())) == [[0, 1], [2, 3], [4, 5], [6, 7]]
        orders.append(order)
    assert len({tuple(order) for order in orders}) > 15


def test_the_last_whole_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    for name, state in (("checkpoint-2", "{}"), ("checkpoint-10", '{"global_'), ("checkpoint-11", None)):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_magnitudes_of_a_sine(device):
    # A sine of amplitude a on a bin has the magnitude a/2 times the sum of the window.
    n = torch.arange(256, dtype=torch.float64)
    waveform = (0.5 * torch.sin(2 * torch.pi * 8 / 64 * n)).float().to(device)
    spectrum = magnitudes(waveform[None], torch.hann_window(64, device=device))
    assert_close(spectrum[0, 4:-4, 8], torch.full((9,), 0.25 * 32), atol=1e-4)


def test_mel_loss_is_the_sum_of_log_distances(device):
    # Ten times as loud is 1 further in log10, in every band and resolution that holds energy.
    torch.manual_seed(0)
    target = torch.randn(2, 1, 4000, device=device) * 0.01
    loss = MultiScaleMelLoss(16_000, num_mels=(5, 10), window_lengths=(64, 128)).to(device)
    assert_close(loss(10 * target, target), torch.tensor(2.0), atol=1e-3)
    assert loss(target, target) == 0


def test_mel_loss_is_finite_in_silence(device):
    loss = MultiScaleMelLoss(16_000).to(device)
    silence = torch.zeros(1, 1, 4000, device=device, requires_grad=True)
    loss(silence, torch.randn(1, 1, 4000, device=device)).backward()
    assert torch.isfinite(silence.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_for_training_on_a_cpu_change_nothing_but_the_time(dtype):
    torch.manual_seed(0)
    config = FlexiCodecConfig(hidden_size=16, encoder_hidden_size=4, decoder_hidden_size=64)
    model = torch.nn.Sequential(FlexiCodecAcousticEncoder(config), FlexiCodecAcousticDecoder(config))
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):  # all 1 in a new model
            torch.nn.init.uniform_(parameter, 0.5, 2)
    waveforms, weights = torch.randn(2, 1, 12_800), torch.randn(2, 1, 12_784)

    def results():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(waveforms).float()
        (output * weights).sum().backward()
        return output.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected, names = results(), list(model.state_dict())
    plain = {type(module) for module in model.modules()}
    assert optimize_for_cpu_training(model) is model
    assert list(model.state_dict()) == names
    replaced = {torch.nn.Conv1d, torch.nn.ConvTranspose1d, FlexiCodecSnake1d}
    assert replaced <= plain and not replaced & {type(module) for module in model.modules()}
    for value, expectation in zip(results(), expected, strict=True):
        error = torch.linalg.norm(value - expectation) / torch.linalg.norm(expectation)
        assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_adversarial_losses_by_hand(device):
    real = [torch.tensor([1.0, 0.0], device=device), torch.tensor([[0.5]], device=device)]
    fake = [torch.tensor([0.0, 2.0], device=device), torch.tensor([[1.0]], device=device)]
    scores = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
    # (0 + 1) / 2 + (0 + 4) / 2 + 0.25 + 1
    assert_close(discriminator_loss(scores), torch.tensor(3.75))
    # (1 + 1) / 2 + 0
    assert_close(adversarial_loss(scores), torch.tensor(1.0))
    # (1 + 2) / 2 + 0.5
    assert_close(feature_matching_loss([scores]), torch.tensor(2.0))


def test_discriminators_have_the_published_shapes(device):
    discriminators = Discriminators(size=2).to(device)
    scores, features = discriminators(torch.randn(3, 1, 4001, device=device))
    assert len(scores) == len(features) == 5 + 3
    assert all(score.shape[:2] == (3, 1) for score in scores)
    assert [len(layers) for layers in features] == [5] * 5 + [5 * 5] * 3
    assert scores[1].shape[-1] == 3  # columns of samples three apart
    num_frames = 1 + 4001 // 128  # of the window of 512
    assert features[7][0].shape == (3, 2, num_frames, int(257 * 0.1))


def test_a_period_discriminator_sees_samples_a_period_apart(device):
    discriminator = PeriodDiscriminator(3, base_size=2).to(device)
    waveform = torch.randn(1, 1, 300, device=device, requires_grad=True)
    discriminator(waveform)[-1][..., 1].sum().backward()
    assert set(waveform.grad[0, 0].nonzero()[:, 0].remainder(3).tolist()) == {1}


def test_moving_average_by_hand(device):
    model = SimpleNamespace(
        averaged=torch.nn.Linear(1, 1, device=device), generator=torch.nn.Linear(1, 1, device=device)
    )
    torch.nn.init.constant_(model.averaged.weight, 1.0)
    torch.nn.init.constant_(model.generator.weight, 3.0)
    average = MovingAverage(decay=0.25)
    average.on_step_end(None, TrainerState(global_step=1), None, model)  # keeps min(0.25, 2 / 11) of 1
    expected = 2 / 11 + 3 * 9 / 11
    assert model.averaged.weight.item() == pytest.approx(expected)
    for step in (2, 3):  # keeps a quarter, twice
        average.on_step_end(None, TrainerState(global_step=step), None, model)
    assert model.averaged.weight.item() == pytest.approx(expected / 16 + 3 * 15 / 16)
    assert model.generator.weight.item() == 3


def test_plots_a_spectrogram_for_each_waveform():
    figure = plot_spectrograms({"a": np.zeros(4000), "b": np.zeros(100)}, 16_000)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, "Mister Darcy's reply, however, was: No!"], vocab_size=60)


def test_tokenizer_keeps_the_words(tokenizer):
    ids = tokenizer("He was  NOT Mister Darcy's, man!").input_ids
    assert tokenizer.decode(ids) == "he was not mister darcy's man"
    assert tokenizer.pad_token_id not in ids


def test_decodes_the_likeliest_path(tokenizer, device):
    he, was = tokenizer("he").input_ids, tokenizer("was").input_ids
    path = [0, *he, he[-1], 0, *was, 0, *was, was[-1]]
    logits = torch.nn.functional.one_hot(torch.tensor([path + [5]]), len(tokenizer)).float().to(device)
    mask = torch.ones(1, len(path) + 1, device=device, dtype=torch.long)
    mask[:, -1] = 0
    assert decode_ctc(tokenizer, best_paths(logits, mask)) == ["he was was"]


def ctc_config(vocab_size):
    return FunAsrNanoEncoderConfig(
        num_mel_bins=4,
        num_stacked_frames=2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_timestamp_prediction_layers=0,
        vocab_size=vocab_size,
        pad_token_id=0,
    )


def test_ctc_loss_is_that_of_the_items_alone(tmp_path, device):
    torch.manual_seed(0)
    model = SemanticEncoderForCTC(ctc_config(7)).to(device).eval()
    features = torch.randn(2, 12, 8, device=device)
    labels = torch.tensor([[3, 3, 4], [5, -100, -100]], device=device)
    mask = torch.ones(2, 12, device=device, dtype=torch.long)
    mask[1, 5:] = 0
    together = model(features, mask, labels)
    first = model(features[:1], mask[:1], labels[:1])
    second = model(features[1:, :5], mask[1:, :5], labels[1:, :1])
    assert_close(together.loss, ((first.loss + second.loss) / 2).detach().cpu(), atol=1e-5)
    assert_close(together.logits[1, :5], second.logits[0].detach().cpu(), atol=1e-5)

    textless = torch.full((1, 3), -100, device=device)
    half = model(features, mask, torch.cat([labels[:1], textless])).loss
    assert_close(half, (first.loss / 2).detach().cpu(), atol=1e-5)

    model.save_pretrained(tmp_path)
    loaded = SemanticEncoderForCTC.from_pretrained(tmp_path).to(device)
    torch.testing.assert_close(loaded(features, mask, labels).loss, together.loss)


def test_teacher_loss_by_hand(device):
    hidden_states = torch.zeros(2, 3, 4, device=device)
    targets = torch.tensor([1.0, 2.0, 3.0], device=device)[None, :, None].expand(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device)
    assert_close(teacher_loss(hidden_states, targets, mask), torch.tensor(((1 + 4 + 9) / 3 + 1) / 2))


def test_a_teacher_hears_clips_that_share_a_window(monkeypatch):
    windows = []

    class Whisper:
        n_mels = 80

        def encode(self, features, to_cpu):
            windows.append(features)
            return features.max(axis=1)[:, ::2, None].repeat(4, axis=2)

    storage = SimpleNamespace(from_array=np.asarray)
    module = SimpleNamespace(models=SimpleNamespace(Whisper=lambda *_, **__: Whisper()), StorageView=storage)
    monkeypatch.setattr(teacher, "require", lambda *_: module)
    hears = teacher.WhisperTeacher("whisper")
    clips = [np.random.default_rng(0).normal(size=seconds * 16_000).astype(np.float32) for seconds in (1, 12, 14, 20)]
    states = hears(clips)
    assert len(windows) == 2
    assert [item.shape for item in states] == [(-(-len(clip) // 960), 4) for clip in clips]
    assert min(item[:-1].min() for item in states) > max(windows[0][0].min(axis=0)[-50:].max(), 0)  # no silence in it
    with pytest.raises(ValueError, match=r"hears at most 29.5 s at once, and a clip has 30.0 s"):
        hears([np.zeros(30 * 16_000, np.float32)])


def test_projection_of_a_teacher():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(500, 3, generator=random) @ torch.randn(3, 8, generator=random) + 5
    projection = teacher.TeacherProjection.fit(states, 3, whitening=1.0)
    assert_close(torch.cov(((states - projection.mean) @ projection.basis).T), torch.eye(3), atol=0.05)
    targets = projection.targets(states, 500)
    assert_close(targets.square().mean(dim=1), torch.ones(500), atol=1e-4)
    assert torch.equal(projection.targets(states[::2], 250), targets[::2])
    assert projection.targets(states, 250).shape == (250, 3)
    with pytest.raises(ValueError, match="`hidden_size` must be at most the teacher's, 8, got 9"):
        teacher.TeacherProjection.fit(states, 9)


RATES = {0.91: 8.3, 0.86: 6.25}


def test_similarities_are_spread():
    """The loss is small for similarities whose thresholds have the rates, wherever they lie."""
    quantiles = torch.rand(1500, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)

    def loss(width, scale=0.02):
        distances = torch.exp(-0.649 * width * quantiles.logit()) * scale
        angles = torch.cumsum(torch.arccos(1 - distances.clamp(max=2)), dim=0)
        frames = torch.stack([angles.cos(), angles.sin()])[None]
        features = torch.nn.functional.interpolate(frames, 2000, mode="linear").mT
        return similarity_spread_loss(features, torch.ones(1, 2000), RATES).item()

    assert max(loss(1.0), loss(1.0, scale=0.04)) < 0.25 < loss(0.2)


def test_similarities_are_calibrated():
    torch.manual_seed(0)
    model = SemanticEncoderForCTC(ctc_config(10)).eval()
    model.encoder.layers[-1].final_layernorm.weight.data = torch.linspace(1, 0.1, 16)  # channels that vary unlike
    features, mask = torch.randn(2, 401, 8), torch.ones(2, 400)
    features = features[:, 1:] + features[:, :-1]  # neighbors are somewhat alike
    before = model(features, mask)
    rates = calibrate_similarities(model, before.last_hidden_state.detach(), torch.tensor([400, 300]), RATES)
    assert rates == pytest.approx(RATES, abs=0.2)
    after = model(features, mask)
    states = torch.cat([after.last_hidden_state[0], after.last_hidden_state[1, :300]])
    similarities = torch.cosine_similarity(states[1:], states[:-1], dim=-1)
    assert (similarities <= 0.91).float().mean() * 12.5 == pytest.approx(8.3, abs=0.3)
    assert torch.corrcoef(torch.stack([before.logits.flatten(), after.logits.flatten()]))[0, 1] > 0.95
