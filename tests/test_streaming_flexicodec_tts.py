"""Speech while its tokens are drawn."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest
import torch
from transformers import pipeline

from conftest import assert_close
from flexicodec_hf import (
    FlexiCodecAudioStreamer,
    FlexiCodecForTextToSpeech,
    FlexiCodecTTSPipeline,
    FlexiCodecTTSProcessor,
)


TEXT = "Hello there, all of you."
LONG = "The first of the sentences is here. A second one follows it at once, and is longer."
LENGTHS = {"min_new_tokens": 30, "max_new_tokens": 30}
NUM_PROMPT = 12  # codec frames
SMALL = {"first_chunk_s": 0.3, "max_chunk_s": 0.6}


@pytest.fixture(scope="module")
def loaded(tts_repository):
    return FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts").eval()


@pytest.fixture
def model(loaded, device):
    return loaded.to(device)


@pytest.fixture(scope="module")
def processor(tts_repository):
    return FlexiCodecTTSProcessor.from_pretrained(tts_repository)


@pytest.fixture
def tts(loaded, processor, device):
    return FlexiCodecTTSPipeline(loaded, processor=processor, tokenizer=processor.tokenizer, device=device)


def start(model, inputs, streamer, **kwargs):
    """A thread that generates, and where its output will be."""
    options = {"seed": 1, "return_dict_in_generate": True, **LENGTHS, **kwargs}
    output = {}
    thread = threading.Thread(
        target=lambda: output.update(model.generate(**inputs.to(model.device), streamer=streamer, **options))
    )
    thread.start()
    return thread, output


def stream(model, inputs, streamer, **kwargs):
    """The chunks of a text, and what `generate` returned."""
    thread, output = start(model, inputs, streamer, **kwargs)
    chunks = list(streamer)
    thread.join()
    return chunks, output


def whole(model, inputs, **kwargs):
    return model.generate(
        **inputs.to(model.device), **{"seed": 1, "return_dict_in_generate": True, **LENGTHS, **kwargs}
    )


@pytest.mark.parametrize("use_nar", [True, False])
@pytest.mark.parametrize("limit", [LENGTHS, {"min_new_tokens": 4, "max_new_tokens": 300}])
def test_streamed_tokens_and_length_are_those_of_the_whole(model, processor, use_nar, limit):
    inputs = processor(TEXT)
    expected = whole(model, inputs, use_nar=use_nar, **limit)
    streamer = FlexiCodecAudioStreamer(**SMALL)
    chunks, output = stream(model, inputs, streamer, use_nar=use_nar, **limit)
    assert len(chunks) > 2 or output["audio_codes"].shape[2] < 10
    for name in ("audio_codes", "token_lengths"):
        assert torch.equal(output[name], expected[name].cpu())
    assert output["audio"].shape == expected.audio.shape
    np.testing.assert_array_equal(np.concatenate(chunks), output["audio"][0, 0])
    assert streamer.sampling_rate == int(output["sampling_rate"]) == int(expected.sampling_rate)
    assert chunks[0].dtype == np.float32


@pytest.mark.parametrize("use_nar", [True, False])
def test_one_chunk_is_the_whole(model, processor, use_nar):
    inputs = processor(TEXT)
    chunks, _ = stream(
        model, inputs, FlexiCodecAudioStreamer(first_chunk_s=60, max_chunk_s=60), use_nar=use_nar, voice="ben"
    )
    assert len(chunks) == 1
    expected = whole(model, inputs, use_nar=use_nar, voice="ben").audio[0, 0]
    assert_close(torch.from_numpy(chunks[0]), expected.cpu(), atol=1e-5)


def test_chunks_begin_early_and_grow_to_their_limit(model, processor):
    streamer = FlexiCodecAudioStreamer(first_chunk_s=0.3, chunk_growth=2, max_chunk_s=1.2)
    chunks, output = stream(model, processor(TEXT), streamer, use_nar=False, min_new_tokens=60, max_new_tokens=60)
    # Tokens are not divided, at either end.
    longest = 2 * 0.08 * int(output["token_lengths"].max())
    seconds = [len(chunk) / streamer.sampling_rate for chunk in chunks]
    for value, least in zip(seconds[:-1], [0.3, 0.6, *[1.2] * len(seconds)], strict=False):
        assert least - 0.04 <= value <= least + longest


def test_audio_comes_while_tokens_are_drawn(model, processor, monkeypatch):
    streamer = FlexiCodecAudioStreamer(**SMALL)
    drawn, drawn_at_chunk = [], []
    put, hook = streamer.put, model.ar.register_forward_pre_hook(lambda *_: drawn.append(1))
    monkeypatch.setattr(streamer, "put", lambda value: drawn_at_chunk.append(len(drawn)) or put(value))
    _, output = stream(model, processor(TEXT), streamer, use_nar=False)
    hook.remove()
    lengths = output["token_lengths"][0].cumsum(0)
    # 0.3 s of a chunk, a frame to fade and two of context are seven frames, and a token's duration
    # is known a step later.
    assert drawn_at_chunk[0] <= int((lengths < 7 + lengths.diff().max()).sum()) + 2
    assert drawn_at_chunk[1] < drawn_at_chunk[2] < len(drawn)


def stands_out(waveform, joints, whole, rate):
    """Whether energy or spectrum change at a joint as they do nowhere in the whole."""
    size = rate // 50

    def changes(samples):
        window = torch.hann_window(size)
        spectrum = torch.stft(torch.as_tensor(samples), size, size // 2, window=window, return_complex=True)
        levels = spectrum.abs().clamp(min=1e-3).log()
        return torch.stack([levels.diff(dim=1).abs().mean(dim=0), levels.mean(dim=0).diff().abs()])

    usual, found = changes(whole).amax(dim=1), changes(waveform)
    return any(
        (found[:, 2 * joint // size - 4 : 2 * joint // size + 5].amax(dim=1) > 1.2 * usual).any() for joint in joints
    )


@pytest.mark.parametrize("use_nar", [True, False])
def test_joints_do_not_stand_out(model, processor, use_nar):
    inputs, streamer = processor(TEXT), FlexiCodecAudioStreamer(**SMALL)
    chunks, _ = stream(model, inputs, streamer, use_nar=use_nar, seed=3)
    joined, expected = np.concatenate(chunks), whole(model, inputs, use_nar=use_nar, seed=3).audio[0, 0].cpu()
    joints, rate = np.cumsum([len(chunk) for chunk in chunks])[:-1], streamer.sampling_rate
    assert len(joints) > 3
    assert not stands_out(joined, joints, expected, rate)
    joined[joints[1] : joints[1] + rate // 50] = 0
    assert stands_out(joined, joints, expected, rate)


def test_the_codec_hears_what_was_spoken_before(model, processor):
    inputs = processor(TEXT)
    expected = whole(model, inputs, use_nar=False).audio[0, 0].cpu()
    distances = []
    for lookahead_s in (0.0, 0.96):
        streamer = FlexiCodecAudioStreamer(**SMALL, lookahead_s=lookahead_s)
        chunks, _ = stream(model, inputs, streamer, use_nar=False)
        distances.append((torch.from_numpy(np.concatenate(chunks)) - expected).norm() / expected.norm())
    assert distances[1] < distances[0] < 0.5


def test_the_voicebox_continues_what_was_spoken_before(model, processor, monkeypatch):
    calls = []
    sample = model.voicebox.sample
    monkeypatch.setattr(
        model.voicebox, "sample", lambda *args, **kwargs: calls.append(kwargs) or sample(*args, **kwargs)
    )
    streamer = FlexiCodecAudioStreamer(**SMALL, prompt_s=0.08 * NUM_PROMPT)
    chunks, output = stream(model, processor(TEXT), streamer, voice="anna")
    voice, factor = model.voices["anna"], model.voicebox.config.upsample_factor
    codes = output["audio_codes"][0, 0].repeat_interleave(output["token_lengths"][0])
    of_voice = voice.tokens_at(0.91)[0].repeat_interleave(voice.tokens_at(0.91)[1])
    length = min(len(of_voice), len(voice.mel) // factor)
    begins = np.cumsum([len(chunk) for chunk in chunks[:-1]]) // round(0.08 * streamer.sampling_rate)
    assert len(calls) > 4
    for call, begin in zip(calls[1:], begins.tolist(), strict=True):
        prompt, mel = call["prompt_codes"][0].cpu(), call["prompt_mel"][0].cpu()
        spoken = min(begin, NUM_PROMPT - min(length, max(NUM_PROMPT - begin, NUM_PROMPT // 2)))
        said = len(prompt) - spoken
        assert len(prompt) * factor == len(mel) and len(prompt) <= NUM_PROMPT
        assert torch.equal(prompt[said:], codes[begin - spoken : begin])
        assert torch.equal(prompt[:said], of_voice[length - said : length])
        assert torch.equal(mel[: said * factor], voice.mel[(length - said) * factor : length * factor])


@pytest.mark.parametrize("use_nar", [True, False])
def test_leaving_the_loop_ends_the_generation(model, processor, use_nar):
    streamer = FlexiCodecAudioStreamer(**SMALL)
    thread, output = start(model, processor(TEXT), streamer, use_nar=use_nar, min_new_tokens=2000, max_new_tokens=2000)
    for _ in streamer:
        break
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive() and streamer.closed
    assert 0 < output["audio_codes"].shape[2] < 2000 and output["audio"].shape[2] > 0


def test_a_streamer_that_is_closed_stops_the_flow(model, processor):
    streamer = FlexiCodecAudioStreamer(first_chunk_s=60, max_chunk_s=60)
    steps = []
    model_steps = model.voicebox.mel_mlp.register_forward_pre_hook(
        lambda *_: steps.append(1) or (streamer.close() if len(steps) == 6 else None)
    )
    thread, output = start(model, processor(TEXT), streamer, num_inference_steps=500)
    thread.join(timeout=60)
    model_steps.remove()
    assert not thread.is_alive() and len(steps) < 10 and output["audio"].shape == (1, 1, 0)


def test_several_are_spoken_at_once(model, processor):
    texts = [TEXT, "And one more text.", LONG]
    expected = [stream(model, processor(text), FlexiCodecAudioStreamer(**SMALL), seed=7)[0] for text in texts]
    streamers = [FlexiCodecAudioStreamer(**SMALL) for _ in texts]
    threads = [start(model, processor(text), one, seed=7)[0] for text, one in zip(texts, streamers, strict=True)]
    for streamer, chunks in zip(streamers, expected, strict=True):
        np.testing.assert_allclose(np.concatenate(list(streamer)), np.concatenate(chunks), atol=1e-5)
    for thread in threads:
        thread.join()


def test_a_slow_consumer_loses_nothing_and_holds_the_generation_back(model, processor):
    expected, _ = stream(model, processor(TEXT), FlexiCodecAudioStreamer(**SMALL), use_nar=False)
    streamer = FlexiCodecAudioStreamer(**SMALL, max_waiting=1)
    thread, _ = start(model, processor(TEXT), streamer, use_nar=False)
    time.sleep(1.0)
    assert thread.is_alive()
    chunks = []
    for chunk in streamer:
        chunks.append(chunk)
        time.sleep(0.02)
    thread.join()
    np.testing.assert_array_equal(np.concatenate(chunks), np.concatenate(expected))


def test_async_for(model, processor):
    expected, _ = stream(model, processor(TEXT), FlexiCodecAudioStreamer(**SMALL), use_nar=False)

    async def listen():
        streamer = FlexiCodecAudioStreamer(**SMALL)
        thread, _ = start(model, processor(TEXT), streamer, use_nar=False)
        chunks = [chunk async for chunk in streamer]
        thread.join()
        return chunks

    async def leave():
        streamer = FlexiCodecAudioStreamer(**SMALL)
        thread, _ = start(model, processor(TEXT), streamer, min_new_tokens=2000, max_new_tokens=2000)

        async def consume():
            async for _ in streamer:
                await asyncio.sleep(60)

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(thread.join, 20)
        return thread.is_alive()

    np.testing.assert_array_equal(np.concatenate(asyncio.run(listen())), np.concatenate(expected))
    assert asyncio.run(leave()) is False


def test_an_error_is_raised_where_the_audio_is_awaited(model, processor):
    streamer = FlexiCodecAudioStreamer()
    with pytest.raises(ValueError, match="'nobody' is not known"):
        model.generate(**processor(TEXT).to(model.device), voice="nobody", streamer=streamer)
    with pytest.raises(ValueError, match="'nobody' is not known"):
        list(streamer)
    with pytest.raises(ValueError, match="speech of one text, got 2 texts"):
        model.generate(**processor([TEXT, LONG]).to(model.device), streamer=FlexiCodecAudioStreamer())
    with pytest.raises(TimeoutError, match=r"No audio came within 0.01 s"):
        list(FlexiCodecAudioStreamer(timeout=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_chunk_s": 0}, "`first_chunk_s` must be at least 0.08"),
        ({"chunk_growth": 0.5}, "`chunk_growth` must be at least 1"),
        ({"first_chunk_s": 5.0}, "`max_chunk_s` must be at least 5.0, got 4.0"),
        ({"prompt_s": 0}, "`prompt_s` must be at least 0.16"),
        ({"max_waiting": 0}, "`max_waiting` must be at least 1"),
        ({"timeout": "1"}, "`timeout` must be at least 0.0, got '1'"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FlexiCodecAudioStreamer(**options)


def test_nothing_said_is_an_empty_stream(model, processor):
    end = model.config.ar_config.end_token_id

    def only_end(input_ids, scores):
        is_end = torch.arange(scores.shape[1], device=scores.device) == end
        return torch.zeros_like(scores).masked_fill(~is_end, -torch.inf)

    streamer = FlexiCodecAudioStreamer()
    chunks, output = stream(model, processor(TEXT), streamer, min_new_tokens=0, logits_processor=[only_end])
    assert chunks == [] and output["audio"].shape == (1, 1, 0) and output["audio_codes"].shape == (1, 1, 0)


# The pipeline


def options(**kwargs):
    return {"seed": 0, "max_piece_length": 48, "generate_kwargs": LENGTHS | {"num_inference_steps": 1} | kwargs}


def test_the_pipeline_streams_inside_the_pieces(tts):
    chunks = list(tts.stream(LONG, streamer_kwargs=SMALL, **options()))
    said = [chunk["text"] for chunk in chunks]
    assert [text for text in said if text] == [LONG[:35], LONG[36:]]
    assert said[0] and len(said) > 6
    joined, expected = np.concatenate([chunk["audio"] for chunk in chunks]), tts(LONG, **options())["audio"]
    assert joined.shape == expected.shape and chunks[0]["sampling_rate"] == 24_000
    elapsed = [chunk["elapsed_s"] for chunk in chunks]
    assert elapsed == sorted(elapsed) and elapsed[0] < elapsed[-1] / 2


def test_one_chunk_for_each_piece_is_the_call(tts):
    streamer_kwargs = {"first_chunk_s": 60, "max_chunk_s": 60}
    chunks = list(tts.stream(LONG, streamer_kwargs=streamer_kwargs, **options()))
    joined, expected = np.concatenate([chunk["audio"] for chunk in chunks]), tts(LONG, **options())["audio"]
    np.testing.assert_allclose(joined, expected, atol=1e-5)


def test_leaving_the_loop_of_the_pipeline_ends_its_thread(tts):
    before = threading.active_count()
    endless = tts.stream(LONG, streamer_kwargs=SMALL, **options(max_new_tokens=2000, min_new_tokens=2000))
    next(endless)
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before


def test_errors_of_the_pipeline_reach_the_loop(tts):
    with pytest.raises(ValueError, match="'nobody' is not known"):
        list(tts.stream(TEXT, voice="nobody"))


def test_a_model_without_voices_keeps_the_voice_of_the_first_piece(tts_repository, device, monkeypatch):
    tts = pipeline("text-to-speech", model=str(tts_repository), pipeline_class=FlexiCodecTTSPipeline, device=device)
    tts.model.voices = {}
    calls, generate = [], tts.model.generate
    monkeypatch.setattr(tts.model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    assert len(list(tts.stream(LONG + " " + LONG, streamer_kwargs=SMALL, **options()))) > 4
    assert "voice" not in calls[0] and calls[1]["voice"] is calls[2]["voice"]
