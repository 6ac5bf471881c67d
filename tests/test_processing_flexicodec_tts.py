"""Text, recordings and chats to inputs; speech to files."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

from conftest import AUDIO, assert_close, byte_tokenizer
from flexicodec_hf import (
    FlexiCodecFeatureExtractor,
    FlexiCodecMelFeatureExtractor,
    FlexiCodecTTSOutput,
    FlexiCodecTTSProcessor,
)
from flexicodec_hf.audio_flexicodec import AudioError, read_audio, resample, resample_with_images
from flexicodec_hf.text_flexicodec import encode_text


FILE = AUDIO / "librivox_austen_0880.flac"


@pytest.fixture(scope="module")
def processor():
    return FlexiCodecTTSProcessor(FlexiCodecFeatureExtractor(), byte_tokenizer(), mel_config={})


@pytest.fixture(scope="module")
def clip():
    return read_audio(FILE, 16_000).waveform[:16_000]


def rows(inputs, name, mask):
    return [row[valid.bool()].tolist() for row, valid in zip(inputs[name], inputs[mask], strict=True)]


@pytest.mark.parametrize("language", ["en", "fr"])
def test_texts_become_what_the_released_model_reads(processor, language):
    texts = ["Hello, world!", '"Yes," she said; 2 of them...', "Go."]
    said = ["A truth universally acknowledged.", "What's that?", "Well"]
    inputs = processor(texts, language=language)
    assert set(inputs) == {"input_ids", "attention_mask", "continuation_ids", "continuation_mask"}
    assert rows(inputs, "input_ids", "attention_mask") == [
        encode_text(processor.tokenizer, text, language) for text in texts
    ]
    clips = [np.sin(np.arange(16_000) / 9)] * 3
    with_references = processor(texts, audio=clips, sampling_rate=16_000, reference_text=said, language=language)
    for text, reference, continuation, prefix in zip(
        texts,
        said,
        rows(inputs, "continuation_ids", "continuation_mask"),
        rows(with_references, "reference_text_ids", "reference_text_mask"),
        strict=True,
    ):
        joined = [*continuation[:1], *prefix, *continuation[1:]]
        assert joined == encode_text(processor.tokenizer, text, language, reference_text=reference)


def test_each_text_has_its_language(processor):
    inputs = processor(["Hello", "Bonjour"], language=["en", "fr"])
    ids = processor.tokenizer.convert_tokens_to_ids(["<|en|>", "<|fr|>"])
    assert inputs["input_ids"][:, 0].tolist() == inputs["continuation_ids"][:, 0].tolist() == ids
    plain = processor("Hello", phonemes=False)
    assert processor.tokenizer.decode(plain["input_ids"][0, 1:]) == "Hello"
    french = FlexiCodecTTSProcessor(processor.feature_extractor, processor.tokenizer, language="fr")
    assert french("Hello")["input_ids"][0, 0] == ids[1]


def test_a_recording_is_heard_alike_however_it_comes(processor, clip, tmp_path):
    soundfile.write(tmp_path / "clip.wav", clip, 16_000, subtype="FLOAT")
    expected = processor(audio=clip, sampling_rate=16_000)
    assert set(expected) | {"reference_text_ids", "reference_text_mask"} == {
        name for name in processor.model_input_names if name.startswith("reference_")
    }
    for audio, options in (
        (tmp_path / "clip.wav", {}),
        (str(tmp_path / "clip.wav"), {}),
        ([tmp_path / "clip.wav"], {}),
        (torch.from_numpy(clip), {"sampling_rate": 16_000}),
        (clip[None], {"sampling_rate": 16_000}),
        ({"array": clip, "sampling_rate": 16_000}, {}),
    ):
        inputs = processor(audio=audio, **options)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(expected["reference_input_values"], torch.from_numpy(clip)[None])
    features = processor.feature_extractor(clip, sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(expected["reference_input_features"], features["input_features"])
    # By way of 16 kHz, like the speech that the Voicebox learned from.
    mel = FlexiCodecMelFeatureExtractor()(
        resample_with_images(clip, 16_000, 24_000), sampling_rate=24_000, return_tensors="pt"
    )
    assert torch.equal(expected["reference_mel"], mel["mel"])


def test_recordings_are_resampled_where_the_rate_is_known(processor, clip):
    waveform = read_audio(AUDIO / "stereo_44k.flac", 44_100).waveform[:44_100]
    inputs = processor(audio=waveform, sampling_rate=44_100)
    assert torch.equal(inputs["reference_input_values"][0], torch.from_numpy(resample(waveform, 44_100, 16_000)))
    both = processor(audio=[waveform, {"array": clip, "sampling_rate": 16_000}], sampling_rate=44_100)
    assert_close(both["reference_input_values"][1], torch.from_numpy(clip), atol=0)
    assert both["reference_mel"].shape == (2, 50, 128)


def test_a_recording_from_the_web(processor):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=AUDIO)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            inputs = processor(audio=f"http://127.0.0.1:{server.server_port}/{FILE.name}")
        except ImportError:
            pytest.skip("transformers before 5.23 reads URLs with librosa")
        finally:
            server.shutdown()
    assert torch.equal(inputs["reference_input_values"], processor(audio=FILE)["reference_input_values"])


def test_without_a_second_stage_there_is_no_mel(processor, clip):
    short = FlexiCodecTTSProcessor(processor.feature_extractor, processor.tokenizer)
    assert "reference_mel" not in short(audio=clip, sampling_rate=16_000)
    assert (short.sampling_rate, processor.sampling_rate) == (16_000, 24_000)


def test_chats(processor, clip, tmp_path):
    soundfile.write(tmp_path / "me.wav", clip, 16_000, subtype="FLOAT")
    options = {"tokenize": True, "return_dict": True}
    say = {"role": "user", "content": [{"type": "text", "text": "Hello there."}]}
    for item in (
        {"type": "audio", "path": str(tmp_path / "me.wav")},
        {"type": "audio", "audio": clip},
        {"type": "audio", "audio": clip, "sampling_rate": 16_000},
    ):
        for said, content in (
            ("what I said", [item, {"type": "text", "text": "what I said"}]),
            ("what I said", [{"type": "text", "text": "what I said"}, item]),
            (None, [item]),
        ):
            messages = [{"role": "voice", "content": content}, say]
            before = json.dumps(messages, default=str)
            inputs = processor.apply_chat_template(messages, **options)
            expected = processor("Hello there.", audio=clip, sampling_rate=16_000, reference_text=said)
            assert set(inputs) == set(expected)
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)
            assert json.dumps(messages, default=str) == before
    together = processor.apply_chat_template([messages, messages], **options)
    assert together["input_ids"].shape[0] == together["reference_mel"].shape[0] == 2
    plain = processor.apply_chat_template([{"role": "user", "content": "Hello there."}], **options)
    assert torch.equal(plain["input_ids"], processor("Hello there.")["input_ids"])
    # In one message, the text is what to say.
    one = [{"role": "user", "content": [item, *say["content"]]}]
    assert torch.equal(processor.apply_chat_template(one, **options)["input_ids"], plain["input_ids"])
    assert processor.apply_chat_template([{"role": "voice", "content": content}, say]) == "<|audio|>Hello there."
    french = processor.apply_chat_template([say], **options, processor_kwargs={"language": "fr"})
    assert torch.equal(french["input_ids"], processor("Hello there.", language="fr")["input_ids"])


def test_chats_that_make_no_sense(processor, clip):
    def apply(*messages):
        return processor.apply_chat_template(list(messages), tokenize=True, return_dict=True)

    voice = {"role": "voice", "content": [{"type": "audio", "audio": clip}]}
    said = {"role": "voice", "content": [*voice["content"], {"type": "text", "text": "What I said."}]}
    say = {"role": "user", "content": "Hello there."}
    for messages, message in (
        ((voice, voice, say), "one recording, of the voice that speaks"),
        (({"role": "system", "content": "Be nice."}, say), "Only the last message is spoken"),
        (({"role": "user", "content": [{"type": "image"}]},), "must be of type 'text' or 'audio', got 'image'"),
        (({"role": "user", "content": [{"type": "audio"}]},), "needs `path`, `url` or `audio`"),
        (({"role": "user", "content": "Say <|audio|>"},), "means a recording: take it out"),
        (([voice, say], [say]), "Either all conversations of a batch need a recording"),
        (([voice, say], [said, say]), "Either all recordings of a batch need a text"),
    ):
        with pytest.raises(Exception, match=message):
            apply(*messages)


def test_speech_to_waveforms_and_files(processor, tmp_path):
    audio = torch.tensor([[[0.1, 0.2, 0.3]], [[0.4, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    output = FlexiCodecTTSOutput(audio=audio, padding_mask=mask, sampling_rate=torch.tensor([16_000, 16_000]))
    waveforms = processor.batch_decode(output)
    assert [waveform.shape for waveform in waveforms] == [(3,), (1,)]
    assert processor.batch_decode(audio)[1].shape == (3,)
    assert [waveform.shape for waveform in processor.batch_decode(audio[0])] == [(3,)]
    assert [waveform.shape for waveform in processor.batch_decode(audio[0, 0])] == [(3,)]

    paths = [tmp_path / "a.wav", tmp_path / "b.flac"]
    processor.save_audio(output, paths)
    assert [soundfile.info(path).samplerate for path in paths] == [16_000, 16_000]
    assert soundfile.info(paths[1]).frames == 1
    processor.save_audio(waveforms[0], paths[0])
    assert soundfile.info(paths[0]).samplerate == 24_000
    processor.save_audio(waveforms[0], str(paths[0]), sampling_rate=8_000)
    assert soundfile.info(paths[0]).samplerate == 8_000
    with pytest.raises(ValueError, match="holds 1 paths for 2 waveforms"):
        processor.save_audio(output, paths[0])
    with pytest.raises(AudioError, match="unknown audio format"):
        processor.save_audio(output, [tmp_path / "a.xyz", paths[1]])


def test_arguments_may_come_as_other_processors_take_them(processor, clip):
    expected = processor(["Hello.", "Bonjour, toi."], audio=clip, sampling_rate=16_000, language="fr")
    nested = processor(
        text=["Hello.", "Bonjour, toi."],
        audio=clip,
        padding=True,
        text_kwargs={"language": "fr", "padding": "longest"},
        audio_kwargs={"sampling_rate": 16_000},
        common_kwargs={"return_tensors": "pt"},
    )
    arrays = processor(["Hello.", "Bonjour, toi."], clip, sampling_rate=16_000, language="fr", return_tensors="np")
    assert set(nested) == set(arrays) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(nested[name], tensor)
        assert isinstance(arrays[name], np.ndarray) and np.array_equal(arrays[name], tensor.numpy())


def test_ids_become_text_again(processor):
    inputs = processor(["Hello", "Go on"], phonemes=False)
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)[1] == "Go on"
    assert processor.batch_decode([row.tolist() for row in inputs["input_ids"]])[1] == "<|en|>Go on"
    assert processor.batch_decode(inputs["input_ids"].numpy())[1] == "<|en|>Go on"
    assert processor.decode(inputs["input_ids"][1]) == "<|en|>Go on"


def test_save_and_load(processor, tmp_path, tts_repository):
    processor.save_pretrained(tmp_path)
    assert "recording" in (tmp_path / "chat_template.jinja").read_text()
    for folder in (tmp_path, tts_repository):
        again = AutoProcessor.from_pretrained(folder)
        assert type(again) is FlexiCodecTTSProcessor
        assert again.chat_template == processor.chat_template and again.sampling_rate == 24_000
        assert type(AutoFeatureExtractor.from_pretrained(folder)) is FlexiCodecFeatureExtractor
        assert AutoTokenizer.from_pretrained(folder)("Hello").input_ids == processor.tokenizer("Hello").input_ids
        assert torch.equal(again("Hello")["input_ids"], processor("Hello")["input_ids"])
    saved = json.loads((tts_repository / "preprocessor_config.json").read_text())
    assert saved["feature_extractor_type"] == "FlexiCodecFeatureExtractor"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"text": 5}, TypeError, "`text` must be a string or a list of them, got 5"),
        ({"text": ["Hello", None]}, TypeError, "`text` must be a string or a list of them, got None"),
        ({"text": "Hello", "language": 5}, TypeError, "`language` must be a string"),
        ({"text": []}, ValueError, "`text` is an empty list"),
        ({"audio": []}, ValueError, "`audio` is an empty list"),
        ({"audio": {"path": "a.wav"}}, ValueError, r"needs `array` and `sampling_rate`, got \['path'\]"),
    ],
)
def test_what_is_of_a_wrong_kind_is_refused(processor, kwargs, error, message):
    with pytest.raises(error, match=message):
        processor(**kwargs)


def test_wrong_use_says_what_to_do(processor, clip):
    call = functools.partial(processor, sampling_rate=16_000)
    for arguments, message in (
        ({}, "pass `text`, `audio`, or both"),
        ({"text": ""}, "must hold something to speak"),
        ({"text": "... !"}, "must hold something to speak"),
        ({"text": ["Hello", "?"]}, "must hold something to speak"),
        ({"text": "Hello", "language": "xx"}, "must be a language code of the tokenizer, got 'xx'"),
        ({"text": "Hello", "language": ["en", "fr"]}, "holds 2 languages for 1 texts"),
        ({"text": "Hello", "reference_text": "Hi"}, "`reference_text` goes with `audio`"),
        ({"audio": clip, "reference_text": "..."}, "`reference_text` must be what `audio` says"),
        ({"audio": clip, "reference_text": ["A", "B"]}, "holds 2 texts for 1 recordings"),
        ({"text": ["Hello"] * 3, "audio": [clip] * 2}, "holds 2 recordings for 3 texts"),
        ({"audio": clip[:7_000]}, r"lasts 0.44 s, too short for a voice: at least 0.5 s"),
        ({"audio": [clip, clip * 1e-5]}, r"`audio\[1\]` is silent"),
        ({"audio": AUDIO / "silence_2s.wav"}, "`audio` is silent"),
        ({"audio": clip, "sampling_rate": None}, "say at which rate"),
        ({"audio": np.stack([clip, clip])}, r"of shape \(2, 16000\)"),
        ({"audio": (clip * 32767).astype(np.int16)}, "must be floats in .* got int16"),
        ({"audio": clip[:0]}, r"of shape \(0,\)"),
        ({"audio": clip * np.nan}, "NaN or infinite"),
        ({"audio": "nowhere.wav"}, "no such file"),
        ({"text": "Hello", "return_tensors": "tf"}, "`return_tensors` must be 'pt'"),
        ({"text": "Hello", "padding": "max_length"}, "must be True or 'longest', got 'max_length'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    with pytest.raises(TypeError, match="unexpected arguments: refernce_text"):
        processor("Hello", refernce_text="Hi")
    with pytest.raises(TypeError, match="unexpected arguments: max_length"):
        processor("Hello", text_kwargs={"max_length": 5})
