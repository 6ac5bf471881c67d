"""What the training recipes are made of: data, losses, discriminators, averages."""

import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig

from conftest import AUDIO, assert_close
from flexicodec_hf.training.data import decode_audio, load_speech, random_crop, speech_loader
from flexicodec_hf.training.discriminators import Discriminators, PeriodDiscriminator
from flexicodec_hf.training.ema import ExponentialMovingAverage
from flexicodec_hf.training.losses import (
    MultiScaleMelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    magnitudes,
)
from flexicodec_hf.training.samples import plot_spectrograms
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC, decode_ctc, train_tokenizer


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
    assert load_speech(tmp_path, "validation")[0]["text"] == "validation"
    assert [row["text"] for row in load_speech(AUDIO, "train[1:2]")] == [TEXT]


def test_loads_a_manifest_of_any_name(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"wav": str(CLIP), "words": TEXT}) + "\n")
    dataset = load_speech(tmp_path / "list.jsonl", audio_column="wav", text_column="words")
    assert dataset[0] == {"text": TEXT, "audio": {"path": str(CLIP), "bytes": None}}


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
    with pytest.raises(FileNotFoundError, match=r"neither a metadata\.jsonl or metadata\.csv nor audio files"):
        load_speech(tmp_path)
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    with pytest.raises(ValueError, match=r"`split` is 'train\[:1\]', but .* has no metadata to take a part of"):
        load_speech(tmp_path, "train[:1]")
    parquet(tmp_path)
    with pytest.raises(ValueError, match="no column 'text_en': its columns are audio, sentence"):
        load_speech(tmp_path, text_column="text_en")
    with pytest.raises(ValueError, match="no column 'wav'"):
        load_speech(tmp_path, audio_column="wav")


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


def name_and_number(row, random):
    return row["name"], random.random()


def batches(dataset, number, **options):
    loader = iter(speech_loader(dataset, lambda row, random: (row["name"], random.random()), list, seed=3, **options))
    return [next(loader) for _ in range(number)]


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_processes_or_interruptions(streaming):
    dataset = Dataset.from_dict({"name": list("abcdefghijk")})
    if streaming:
        dataset = dataset.to_iterable_dataset()
    whole = batches(dataset, 8, batch_size=4)
    assert [place for place, _ in whole] == [(epoch, batch) for epoch in range(4) for batch in range(2)]
    assert len({name for _, batch in whole[:2] for name, _ in batch}) == 8
    assert whole[0][1] != whole[2][1]  # another order, or another crop, in the next epoch

    parts = [batches(dataset, 8, batch_size=4, process_index=i, num_processes=2) for i in range(2)]
    for (place, batch), first, second in zip(whole, *parts, strict=True):
        assert first[0] == second[0] == place
        assert sorted(first[1] + second[1]) == sorted(batch)

    assert batches(dataset, 3, batch_size=4, start=(2, 1)) == whole[5:]


def test_batches_do_not_depend_on_workers():
    dataset = Dataset.from_dict({"name": list("abcdefghijk")})
    assert batches(dataset, 5, batch_size=4, num_workers=1) == batches(dataset, 5, batch_size=4)


def test_batches_of_about_the_same_length():
    dataset = Dataset.from_dict({"name": list("abcdefgh")})
    batch_names = [
        {name for name, _ in batch} for _, batch in batches(dataset, 4, batch_size=2, lengths=[7, 1, 5, 3, 8, 2, 6, 4])
    ]
    assert {frozenset(names) for names in batch_names} == {frozenset(pair) for pair in ("bf", "dh", "cg", "ae")}


def test_refuses_a_batch_that_cannot_be_shared_or_filled():
    dataset = Dataset.from_dict({"name": list("abc")})
    with pytest.raises(ValueError, match=r"`batch_size` \(3\) must be a multiple of the number of processes, 2"):
        batches(dataset, 1, batch_size=3, num_processes=2)
    with pytest.raises(ValueError, match="3 examples, fewer than `batch_size`=4"):
        batches(dataset, 1, batch_size=4)


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


def test_adversarial_losses_by_hand(device):
    real = [torch.tensor([1.0, 0.0], device=device), torch.tensor([[0.5]], device=device)]
    fake = [torch.tensor([0.0, 2.0], device=device), torch.tensor([[1.0]], device=device)]
    # (0 + 1) / 2 + (0 + 4) / 2 + 0.25 + 1
    assert_close(discriminator_loss(real, fake), torch.tensor(3.75))
    # (1 + 1) / 2 + 0
    assert_close(adversarial_loss(fake), torch.tensor(1.0))
    # (1 + 2) / 2 + 0.5
    assert_close(feature_matching_loss([real], [fake]), torch.tensor(2.0))


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
    model = torch.nn.Linear(1, 1).to(device)
    model.bias.requires_grad_(False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = ExponentialMovingAverage(model, decay=0.25)
    torch.nn.init.constant_(model.weight, 3.0)
    average.update()  # keeps min(0.25, 2 / 11) of 1
    expected = 2 / 11 + 3 * 9 / 11
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3
    restored = ExponentialMovingAverage(model, decay=0.25)
    restored.load_state_dict(average.state_dict())
    for _ in range(2):
        restored.update()
    with restored.applied():  # keeps a quarter, twice
        assert model.weight.item() == pytest.approx(expected / 16 + 3 * 15 / 16)


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
    assert decode_ctc(tokenizer, logits, mask) == ["he was was"]


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

    model.save_pretrained(tmp_path)
    loaded = SemanticEncoderForCTC.from_pretrained(tmp_path).to(device)
    torch.testing.assert_close(loaded(features, mask, labels).loss, together.loss)
