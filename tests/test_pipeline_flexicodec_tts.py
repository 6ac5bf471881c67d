import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor, pipeline

from conftest import AUDIO
from flexicodec_hf import FlexiCodecTTSPipeline, FlexiCodecVoice
from flexicodec_hf.chunking_flexicodec import Crossfader
from flexicodec_hf.cli import main
from flexicodec_hf.cpu_flexicodec import optimize_for_cpu


TEXT = "Hello there, you."
LONG = "The first of the sentences is here. A second one follows it at once, and is longer. Is this the last?"
PIECES = [
    "The first of the sentences is here.",
    "A second one follows it at once, and is longer.",
    "Is this the last?",
]
# One step of the flow: how well the tiny model sings does not matter.
FAST = {"num_inference_steps": 1, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def pipes(tts_repository):
    """`pipes(device)`: the pipeline of the tiny repository, loaded once."""
    loaded = {}

    def load(device: str) -> FlexiCodecTTSPipeline:
        if device not in loaded:
            loaded[device] = pipeline(
                "text-to-speech",
                model=str(tts_repository),
                pipeline_class=FlexiCodecTTSPipeline,
                device=device,
            )
        return loaded[device]

    return load


@pytest.fixture
def tts(pipes, device):
    return pipes(device)


@pytest.fixture
def calls(tts, monkeypatch):
    """What `generate` is called with."""
    calls = []
    generate = tts.model.generate
    monkeypatch.setattr(tts.model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    return calls


def speak(tts, text=TEXT, **kwargs):
    generate_kwargs = FAST | kwargs.pop("generate_kwargs", {})
    return tts(text, **{"seed": 0, **kwargs}, generate_kwargs=generate_kwargs)["audio"]


def test_all_entry_points_speak_the_same(tts, tts_repository, device, tmp_path):
    assert type(tts) is FlexiCodecTTSPipeline
    assert "custom_pipelines" not in json.loads((tts_repository / "config.json").read_text())
    ours = tts(TEXT, seed=3, merging_threshold=0.86, voice="ben", generate_kwargs=FAST)
    assert ours["sampling_rate"] == 24_000
    assert ours["audio"].dtype == np.float32 and ours["audio"].ndim == 1 and len(ours["audio"]) > 2_000

    options = {"seed": 3, "merging_threshold": 0.86, "voice": "ben", **FAST}
    model = AutoModelForTextToWaveform.from_pretrained(tts_repository).to(device)
    inputs = AutoProcessor.from_pretrained(tts_repository)(TEXT).to(device)
    stock = pipeline("text-to-speech", model=str(tts_repository), device=device)
    assert type(stock) is not FlexiCodecTTSPipeline
    if device == "cpu":  # as our pipeline does
        optimize_for_cpu(model)
        optimize_for_cpu(stock.model)
    generated = model.generate(**inputs, **options)
    np.testing.assert_array_equal(ours["audio"], generated[0, 0].cpu())
    np.testing.assert_array_equal(ours["audio"], stock(TEXT, generate_kwargs=options)["audio"])

    streamed = list(
        tts.stream(TEXT, whole_pieces=True, seed=3, merging_threshold=0.86, voice="ben", generate_kwargs=FAST)
    )
    np.testing.assert_array_equal(ours["audio"], np.concatenate([chunk["audio"] for chunk in streamed]))

    # The command line has no --max-new-tokens: a token for a letter or so.
    command = ["speak", TEXT, "-o", str(tmp_path / "out.wav"), "--model", str(tts_repository), "--device", device]
    command += ["--seed", "3", "--merging-threshold", "0.86", "--voice", "ben", "--num-inference-steps", "1"]
    assert main(command) == 0
    expected = tts(TEXT, seed=3, merging_threshold=0.86, voice="ben", generate_kwargs={"num_inference_steps": 1})
    written, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(written, expected["audio"].clip(-1, 1), atol=1 / 32_768)


def test_a_seed_decides(tts):
    np.testing.assert_array_equal(speak(tts), speak(tts))
    other = speak(tts, seed=1)
    assert other.shape != speak(tts).shape or not np.allclose(other, speak(tts))


def test_long_texts_are_spoken_in_pieces_and_joined(tts):
    pieces = [speak(tts, piece) for piece in PIECES]
    whole = speak(tts, LONG, max_piece_length=48, crossfade_s=0)
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    faded = speak(tts, LONG, max_piece_length=48, crossfade_s=0.02)
    assert len(faded) == len(whole) - 2 * 480
    start = len(pieces[0]) - 480
    np.testing.assert_array_equal(faded[:start], whole[:start])
    np.testing.assert_array_equal(faded[480 - len(pieces[2]) :], pieces[2][480:])


def test_stream_yields_each_piece_as_soon_as_it_is_there(tts, calls):
    options = {"seed": 0, "max_piece_length": 48, "generate_kwargs": FAST}
    chunks = []
    for chunk in tts.stream(LONG, whole_pieces=True, **options):
        chunks.append(chunk)
        assert len(calls) == len(chunks)
    assert [chunk["text"] for chunk in chunks] == PIECES
    elapsed = [chunk["elapsed_s"] for chunk in chunks]
    assert 0 < elapsed[0] < elapsed[1] < elapsed[2]
    joined = np.concatenate([chunk["audio"] for chunk in chunks])
    np.testing.assert_array_equal(joined, tts(LONG, **options)["audio"])


def test_batches_change_nothing(tts, device):
    texts = [LONG, TEXT, "And one more text to speak."]
    alone = [speak(tts, text, max_piece_length=48) for text in texts]
    batched = tts(texts, seed=0, max_piece_length=48, batch_size=3, generate_kwargs=FAST)
    assert len(batched) == 3
    for speech, expected in zip(batched, alone, strict=True):
        np.testing.assert_allclose(speech["audio"], expected, atol=1e-4 if device == "cpu" else 1e-2)
    one_text = speak(tts, LONG, max_piece_length=48, batch_size=2)
    np.testing.assert_allclose(one_text, alone[0], atol=1e-4 if device == "cpu" else 1e-2)
    lazily = tts((text for text in texts), seed=0, max_piece_length=48, generate_kwargs=FAST)
    for speech, expected in zip(lazily, alone, strict=True):
        np.testing.assert_array_equal(speech["audio"], expected)


def test_a_reference_is_a_voice(tts, tts_repository, device, tmp_path):
    clip, said = str(AUDIO / "librivox_austen_0890.flac"), "What the recording says."
    expected = speak(tts, reference_audio=clip, reference_text=said)
    assert expected.shape != speak(tts).shape or not np.allclose(expected, speak(tts))
    waveform, rate = soundfile.read(clip, dtype="float32")
    given = {"reference_audio": waveform, "reference_sampling_rate": rate, "reference_text": said}
    np.testing.assert_array_equal(speak(tts, **given), expected)

    voice = tts.encode_voice(clip, said)
    assert voice.metadata["text"] == said
    voice.save(tmp_path / "me.safetensors")
    np.testing.assert_array_equal(speak(tts, voice=FlexiCodecVoice.load(tmp_path / "me.safetensors")), expected)

    # Said once, when the pipeline is made, and as a chat.
    bound = FlexiCodecTTSPipeline(
        tts.model,
        processor=tts.processor,
        tokenizer=tts.tokenizer,
        device=device,
        reference_audio=clip,
        reference_text=said,
        seed=0,
        generate_kwargs=FAST,
    )
    np.testing.assert_array_equal(bound(TEXT)["audio"], expected)
    # What a call sets leaves the rest as it was.
    np.testing.assert_array_equal(bound(TEXT, crossfade_s=0.01, merging_threshold=0.91)["audio"], expected)
    np.testing.assert_array_equal(bound(TEXT, voice="anna")["audio"], speak(tts))
    items = [{"type": "audio", "path": clip}, {"type": "text", "text": said}]
    chat = [{"role": "voice", "content": items}, {"role": "user", "content": [{"type": "text", "text": TEXT}]}]
    np.testing.assert_array_equal(speak(tts, chat), expected)
    np.testing.assert_array_equal(speak(tts, chat, voice="anna"), expected)
    np.testing.assert_array_equal(speak(tts, chat[1:]), speak(tts))
    (chunk,) = tts.stream(chat, whole_pieces=True, seed=0, generate_kwargs=FAST)
    assert chunk["text"] == ""
    np.testing.assert_array_equal(chunk["audio"], expected)


def test_every_piece_has_the_same_voice(tts, calls, monkeypatch):
    speak(tts, LONG, max_piece_length=48, voice="ben")
    assert [call["voice"] for call in calls] == ["ben"] * 3

    # Without any voice, that of the first piece.
    monkeypatch.setattr(tts.model, "voices", {})
    calls.clear()
    whole = speak(tts, LONG, max_piece_length=48, crossfade_s=0)
    assert "voice" not in calls[0] and len(calls) == 4
    voice = calls[1]["voice"]
    assert isinstance(voice, FlexiCodecVoice) and all(call["voice"] is voice for call in calls[1:])
    assert voice.metadata["text"] == PIECES[0]
    np.testing.assert_array_equal(whole, np.concatenate([speak(tts, piece, voice=voice) for piece in PIECES]))
    calls.clear()
    speak(tts, TEXT)
    assert len(calls) == 1 and "voice" not in calls[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_long_text_has_the_voice_of_its_first_piece(tts, calls, monkeypatch, batch_size):
    monkeypatch.setattr(tts.model, "voices", {})
    options = {"seed": 0, "max_piece_length": 48, "generate_kwargs": FAST}
    texts = [LONG, TEXT, LONG[36:]]
    alone = [tts(text, **options)["audio"] for text in texts]
    for together in (texts, (text for text in texts)):
        calls.clear()
        for speech, expected in zip(tts(together, batch_size=batch_size, **options), alone, strict=True):
            np.testing.assert_allclose(speech["audio"], expected, atol=1e-4)
    streamed = np.concatenate([chunk["audio"] for chunk in tts.stream(LONG, whole_pieces=True, **options)])
    np.testing.assert_array_equal(streamed, alone[0])


def test_no_part_of_the_pipeline_but_forward_runs_the_model(tts, calls, monkeypatch):
    encoded = []
    encode = tts.model.encode_voice
    monkeypatch.setattr(tts.model, "encode_voice", lambda **kwargs: encoded.append(kwargs) or encode(**kwargs))
    reference = {"reference_audio": str(AUDIO / "librivox_austen_0890.flac"), "reference_text": "What it says."}
    speak(tts, LONG, max_piece_length=48, **reference)
    assert len(encoded) == 1 and len(calls) == 3
    monkeypatch.setattr(tts.model, "voices", {})
    calls.clear()
    assert len(list(tts.preprocess(LONG, max_piece_length=48))) == 3
    assert not calls and len(encoded) == 1


def test_a_voice_that_cannot_be_invented_is_a_warning(tts, monkeypatch, caplog):
    monkeypatch.setattr(tts.model, "voices", {})
    monkeypatch.setattr(tts, "encode_voice", lambda *args: (_ for _ in ()).throw(ValueError("Too short.")))
    monkeypatch.setattr(logging.getLogger("flexicodec_hf"), "propagate", True)
    assert len(speak(tts, LONG, max_piece_length=48))
    assert "first piece of the text cannot serve as one: Too short." in caplog.text


def test_without_the_voicebox_the_codec_speaks(tts):
    speech = tts(TEXT, seed=0, generate_kwargs={**FAST, "use_nar": False})
    assert speech["sampling_rate"] == 16_000 and len(speech["audio"]) > 1_000


def test_language_decides_the_ids(tts, calls):
    ids = tts.processor(TEXT, language="zh").input_ids
    speak(tts, language="zh")
    speak(tts, [{"role": "user", "content": TEXT}], language="zh")
    assert all(torch.equal(call["input_ids"].cpu(), ids) for call in calls) and len(calls) == 2
    assert not torch.equal(tts.processor(TEXT).input_ids, ids)


SILENCE = np.zeros(32_000, dtype=np.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": ""}, "something to speak"),
        ({"text": "?! ..."}, "something to speak"),
        ({"text": TEXT, "language": "xx"}, "`language` must be .* got 'xx'"),
        ({"text": TEXT, "voice": "nobody"}, "nobody.*anna.*ben"),
        ({"text": TEXT, "merging_threshold": 0.5}, "merging_threshold.*0.5.*0.86"),
        ({"text": TEXT, "reference_audio": SILENCE}, "Got `reference_audio` alone: `reference_audio` goes with"),
        ({"text": TEXT, "reference_text": "x"}, "Got `reference_text` alone: `reference_audio` goes with"),
        ({"text": TEXT, "reference_audio": SILENCE, "reference_text": "x"}, "`sampling_rate`"),
        (
            {"text": TEXT, "reference_audio": SILENCE, "reference_text": "x", "reference_sampling_rate": 16_000},
            "silent",
        ),
        (
            {"text": TEXT, "reference_audio": SILENCE[:800], "reference_text": "x", "reference_sampling_rate": 16_000},
            "lasts 0.05 s, too short",
        ),
        (
            {"text": TEXT, "reference_audio": SILENCE, "reference_text": "x", "voice": "anna"},
            "`voice` or `reference_audio`, not both",
        ),
        ({"text": TEXT, "crossfade_s": 2}, "`crossfade_s` must be between 0 and 1 second, got 2"),
        ({"text": TEXT, "max_piece_length": 3}, "`max_length` must be at least 12"),
        ({"text": TEXT, "generate_kwargs": {"num_return_sequences": 2}}, "`num_return_sequences` must be 1"),
    ],
)
def test_wrong_uses_say_what_to_do(tts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        speak(tts, **kwargs)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ([], {}, ValueError, "`text_inputs` is empty"),
        (5, {}, TypeError, "`text_inputs` must be a text, .* got 5"),
        (TEXT.encode(), {}, TypeError, "`text_inputs` must be a text, .* got b'Hello"),
        ({"text": TEXT}, {}, TypeError, "`text_inputs` must be a text, .* got {'text'"),
        (TEXT, {"batch_size": 0}, ValueError, "`batch_size` must be a whole number, at least 1, got 0"),
        (TEXT, {"batch_size": "2"}, ValueError, "`batch_size` must be a whole number"),
        (TEXT, {"num_workers": -1}, ValueError, "`num_workers` must be a whole number, at least 0, got -1"),
        (TEXT, {"merging_threshold": "0.91"}, TypeError, "`merging_threshold` must be a number, got '0.91'"),
        (TEXT, {"crossfade_s": "0.1"}, TypeError, "`crossfade_s` must be a number"),
        (TEXT, {"voice": 5}, ValueError, "`voice`=5 is not known.*anna"),
    ],
)
def test_what_is_of_a_wrong_kind_is_refused(tts, text, options, error, message):
    with pytest.raises(error, match=message):
        tts(text, **options, generate_kwargs=FAST)


def test_lists_in_place_of_tensors_are_refused(tts):
    inputs = tts.processor(TEXT)
    with pytest.raises(TypeError, match="`attention_mask` must be a tensor, got a list: prepare the inputs"):
        tts.model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask.tolist())
    with pytest.raises(TypeError, match="`audio_codes` must be a tensor, got a list"):
        tts.model.decode_speech([[[1]]])
    with pytest.raises(TypeError, match="`input_values` must be a tensor, got a ndarray"):
        tts.model.convert_voice(np.zeros((1, 1, 16_000)), np.zeros((1, 10, 560)))
    with pytest.raises(TypeError, match=r"`merging_threshold` must be a number, got '0\.91'"):
        tts.model.generate(**inputs, merging_threshold="0.91")


def test_the_processor_is_saved_with_the_pipeline(tts, device, tmp_path):
    tts.save_pretrained(tmp_path)
    expected = speak(tts)
    again = pipeline("text-to-speech", model=str(tmp_path), pipeline_class=FlexiCodecTTSPipeline, device=device)
    np.testing.assert_array_equal(speak(again), expected)
    stock = pipeline("text-to-speech", model=str(tmp_path), device=device)
    assert type(stock.processor) is type(tts.processor)
    assert torch.equal(stock.preprocess(TEXT)["input_ids"], tts.processor(TEXT)["input_ids"])


def test_a_pipeline_without_a_processor_is_refused(tts, device):
    with pytest.raises(ValueError, match=r"has no processor, .* pass `processor=`"):
        FlexiCodecTTSPipeline(tts.model, tokenizer=tts.tokenizer, device=device)


def test_streaming_several_texts_is_an_error(tts):
    with pytest.raises(ValueError, match="`stream` speaks one text or chat, got a list"):
        next(tts.stream([TEXT, TEXT]))


def test_a_repository_of_the_codec_alone_does_not_speak(codec_dir):
    with pytest.raises((ValueError, OSError), match="holds the codec alone"):
        pipeline("text-to-speech", model=str(codec_dir()), pipeline_class=FlexiCodecTTSPipeline)


def joined(waveforms: list[np.ndarray], fade_length: int) -> list[np.ndarray]:
    crossfader, last = Crossfader(fade_length), len(waveforms) - 1
    return [crossfader.add(waveform, index == last) for index, waveform in enumerate(waveforms)]


def test_joints_lose_nothing_and_are_never_louder():
    ones = [np.ones(length, dtype=np.float32) for length in (50, 40, 30)]
    chunks = joined(ones, 10)
    assert [len(chunk) for chunk in chunks] == [40, 30, 30]
    np.testing.assert_allclose(np.concatenate(chunks), 1)
    up = np.concatenate(joined([ones[0], -ones[1]], 10))
    assert (np.diff(up[40:50]) < 0).all() and up[39] == 1 and up[50] == -1


@pytest.mark.parametrize("lengths", [(50, 3, 40), (50, 0, 40), (3, 50), (0, 0), (5, 5, 5), (0, 50), (50, 0)])
def test_joints_of_short_waveforms(lengths):
    chunks = joined([np.ones(length, dtype=np.float32) for length in lengths], 10)
    whole = np.concatenate(chunks)
    np.testing.assert_allclose(whole, 1)
    # Each joint overlaps by ten samples, or by as many as there are.
    expected, held = 0, 0
    for length in lengths:
        expected += length - min(held, length)
        held = min(10, expected)
    assert len(whole) == expected
