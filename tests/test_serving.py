"""`flexicodec-hf serve`, over HTTP, with OpenAI's client."""

import argparse
import asyncio
import base64
import io
import json
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from conftest import AUDIO, TESTS
from flexicodec_hf import FlexiCodecTTSPipeline, FlexiCodecVoice
from flexicodec_hf.cli import serve
from flexicodec_hf.data.runner import CodecRunner, RateSetting


pytest.importorskip("fastapi", reason="needs the extra [serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]")
openai = pytest.importorskip("openai", reason="needs the extra [dev]")
httpx = pytest.importorskip("httpx", reason="needs the extra [dev]")

TEXT = "Hello there."
LONG = "This is the first sentence of a text. " * 9


class Served:
    """A server in a thread of this process."""

    def __init__(self, model, **options):
        parser = argparse.ArgumentParser()
        serve.add_commands(parser.add_subparsers())
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self.app = serve.build_app(parser.parse_args(["serve", f"--model={model}", "--device=cpu", *words]))
        self.engine = self.app.user_middleware[0].kwargs["engine"]
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def speak(self, **values):
        body = {"model": "repository", "input": TEXT, "voice": "default", "response_format": "pcm", "seed": 0} | values
        return self.http.post("/v1/audio/speech", json=body)

    def metric(self, name):
        values = [line.split()[-1] for line in self.http.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(map(float, values))

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def repository(tts_repository, tmp_path_factory):
    link = tmp_path_factory.mktemp("served") / "repository"
    link.symlink_to(tts_repository)
    return link


@pytest.fixture
def start(repository):
    servers = []

    def run(model=repository, **options):
        servers.append(Served(model, **options))
        return servers[-1]

    yield run
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def served(repository):
    server = Served(repository)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tts(tts_repository):
    return pipeline("text-to-speech", model=str(tts_repository), pipeline_class=FlexiCodecTTSPipeline, device="cpu")


@pytest.fixture(scope="module")
def runner(tts_repository):
    return CodecRunner.from_pretrained(str(tts_repository), "cpu", "float32")


def samples(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2") / 32767


def assert_is(pcm: bytes, expected: np.ndarray) -> None:
    spoken = samples(pcm)
    assert spoken.shape == expected.shape
    np.testing.assert_allclose(spoken, expected.clip(-1, 1), atol=1e-3)


@pytest.mark.parametrize("text", [TEXT, LONG])
def test_openais_client_hears_what_the_pipeline_speaks(served, tts, text):
    expected = tts(text, seed=3, voice="ben")
    options = {"model": "repository", "input": text, "voice": "ben", "extra_body": {"seed": 3}}
    speech = served.openai.audio.speech.create(**options, response_format="pcm")
    assert_is(speech.content, expected["audio"])
    assert speech.response.headers["x-sampling-rate"] == "24000" and speech.response.headers["x-seed"] == "3"

    with served.openai.audio.speech.with_streaming_response.create(**options, response_format="wav") as response:
        parts = list(response.iter_bytes(chunk_size=None))
    written, rate = soundfile.read(io.BytesIO(b"".join(parts)), dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(written, expected["audio"].clip(-1, 1), atol=1e-3)


def test_audio_is_sent_while_it_is_made(served, monkeypatch):
    generate, go_on, calls = served.engine.speaker.model.generate, threading.Event(), []

    def waiting(*args, **kwargs):
        calls.append(kwargs)
        assert len(calls) == 1 or go_on.wait(20)
        return generate(*args, **kwargs)

    monkeypatch.setattr(served.engine.speaker.model, "generate", waiting)
    body = {"model": "repository", "input": LONG, "response_format": "pcm"}
    with served.http.stream("POST", "/v1/audio/speech", json=body) as response:
        parts = response.iter_bytes()
        assert next(parts)  # while the second piece cannot be spoken
        go_on.set()
        assert sum(map(len, parts)) > 0
    assert len(calls) > 1


@pytest.mark.parametrize("format", ["mp3", "opus", "flac", "wav"])
def test_formats_can_be_read(served, format):
    expected = samples(served.speak(input=LONG).content)
    answer = served.speak(input=LONG, response_format=format)
    audio, rate = soundfile.read(io.BytesIO(answer.content))
    assert rate == 24_000 and answer.headers["content-type"].startswith("audio/")
    delay = {"mp3": 2304, "opus": 480}.get(format, 0)
    assert 0 <= len(audio) - len(expected) <= delay
    if delay == 0:
        np.testing.assert_allclose(audio, expected, atol=1e-4)


def test_events_carry_the_same_audio(served):
    answer = served.speak(stream_format="sse")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.strip().split("\n\n")]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * (len(events) - 1) + ["speech.audio.done"]
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert audio == served.speak().content


def test_flac_is_sent_while_it_is_spoken_in_events(served):
    answer = served.speak(input=LONG, response_format="flac", stream_format="sse")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.strip().split("\n\n")]
    parts = [base64.b64decode(event["audio"]) for event in events[:-1]]
    assert len(parts) > 1 and all(parts)
    expected = samples(served.speak(input=LONG).content)
    file = bytearray(b"".join(parts))
    rate_to_length = int.from_bytes(file[18:26], "big")
    assert rate_to_length % 2**36 == 0  # no length, which libsndfile needs
    file[18:26] = (rate_to_length + len(expected)).to_bytes(8, "big")
    audio, _ = soundfile.read(io.BytesIO(file))
    np.testing.assert_allclose(audio, expected, atol=1e-4)


def test_a_batch_of_one_is_streamed_by_the_pipeline(start, tts):
    server = start(batch_size=1)
    expected = np.concatenate([chunk["audio"] for chunk in tts.stream(LONG, seed=1, voice="ben")])
    assert_is(server.speak(input=LONG, seed=1, voice="ben").content, expected)
    assert server.speak(voice={"id": "ben"}, language="fr", temperature=0.5, use_nar=False).status_code == 200


def test_settings_reach_the_model(served, tts):
    settings = {"temperature": 0.5, "top_k": 3, "guidance_scale": 1.0, "num_inference_steps": 1, "use_nar": False}
    expected = tts(TEXT, seed=0, language="zh", merging_threshold=0.86, generate_kwargs=settings)
    answer = served.speak(language="zh", merging_threshold=0.86, **settings)
    assert answer.headers["x-sampling-rate"] == "16000"
    assert_is(answer.content, expected["audio"])


def test_without_a_seed_the_answer_says_it(served):
    answer = served.speak(seed=None)
    assert served.speak(seed=int(answer.headers["x-seed"])).content == answer.content


def test_models_and_health(served):
    assert [model.id for model in served.openai.models.list()] == ["repository"]
    assert served.openai.models.retrieve("repository").id == "repository"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        served.openai.models.retrieve("other")
    assert served.http.get("/health").json() == {"status": "ok"}


def test_many_clients_each_get_their_own(served, tts):
    texts = [f"This is client {word}." * (1 + number % 3) for number, word in enumerate("abcdefghijklmnop")]
    voices = ["anna", "ben"]
    expected = {
        (text, voice): tts(text, seed=number, voice=voice)["audio"]
        for number, text in enumerate(texts)
        for voice in voices
    }
    before = served.metric("flexicodec_batch_size_sum"), served.metric("flexicodec_batch_size_count")

    def ask(client: int) -> None:
        number, voice = client % len(texts), voices[client // len(texts) % 2]
        answer = served.speak(input=texts[number], voice=voice, seed=number)
        assert answer.status_code == 200, answer.text
        assert_is(answer.content, expected[texts[number], voice])

    with ThreadPoolExecutor(64) as clients:
        list(clients.map(ask, range(64)))
    requests = served.metric("flexicodec_batch_size_sum") - before[0]
    batches = served.metric("flexicodec_batch_size_count") - before[1]
    assert requests / batches > 3
    assert served.metric("flexicodec_jobs") == 0


class Held:
    """Holds the model until `release`."""

    def __init__(self, server, monkeypatch):
        generate, self.held, self.go_on = server.engine.speaker.model.generate, threading.Event(), threading.Event()

        def waiting(*args, **kwargs):
            self.held.set()
            assert self.go_on.wait(30)
            return generate(*args, **kwargs)

        monkeypatch.setattr(server.engine.speaker.model, "generate", waiting)

    def release(self):
        self.go_on.set()


def until(condition, seconds=10):
    for _ in range(50 * seconds):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to be")


def test_a_full_queue_refuses_and_says_when_to_come_back(start, monkeypatch):
    server = start(max_requests=2)
    held = Held(server, monkeypatch)
    with ThreadPoolExecutor() as clients:
        first = [clients.submit(server.speak) for _ in range(2)]
        until(lambda: server.metric("flexicodec_jobs ") == 2)
        refused = server.speak()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        held.release()
        assert [answer.result().status_code for answer in first] == [200, 200]
    assert server.speak().status_code == 200


def test_work_stops_when_the_client_leaves(start, monkeypatch):
    server = start()
    held = Held(server, monkeypatch)
    body = {"model": "repository", "input": LONG}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/audio/speech", json=body, timeout=0.5)
    until(lambda: server.metric("flexicodec_canceled_total") == 1)
    held.release()
    until(lambda: server.metric("flexicodec_jobs ") == 0)
    assert server.metric("flexicodec_batch_size_count") == 1  # of several pieces


def test_clients_that_hang_do_not_stop_the_others(start):
    server = start(timeout=1)
    body = json.dumps({"model": "repository", "input": LONG * 10, "response_format": "wav"}).encode()
    head = b"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    def connect(received: int) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
        client.connect(("127.0.0.1", server.port))
        return client

    silent, half, deaf = connect(65536), connect(65536), connect(1)
    half.sendall(head % len(body) + body[:10])
    deaf.sendall(head % len(body) + body)  # and never reads
    assert server.speak().status_code == 200
    half.settimeout(20)
    assert b" 408 " in half.recv(1000)
    until(lambda: server.metric("flexicodec_jobs ") == 0)
    for client in (silent, half, deaf):
        client.close()


def test_an_answer_that_nobody_takes_is_broken_off():
    from flexicodec_hf.serving.app import _Stream

    ended = []

    async def audio():
        try:
            while True:
                yield b"audio"
        finally:
            ended.append(True)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    start = time.monotonic()
    asyncio.run(_Stream(audio(), timeout_s=0.1).stream_response(send))
    assert ended == [True] and time.monotonic() - start < 10


NONSENSE = [
    ({"input": ""}, 400, "nothing to say"),
    ({"input": "?!"}, 400, "something to speak"),
    ({"input": "a" * 5000}, 400, "5000 characters, and may have 4096"),
    ({"input": 3}, 400, "input: "),
    ({"model": "other"}, 404, "no model 'other'"),
    ({"voice": "nobody"}, 400, "There are: default, anna, ben"),
    ({"voice": "../../etc/passwd.safetensors"}, 400, "There is no voice"),
    ({"speed": 2}, 400, "`speed` must be 1"),
    ({"instructions": "Whisper."}, 400, "not followed"),
    ({"response_format": "aac"}, 400, "response_format: Input should be 'mp3', 'opus', 'flac', 'wav' or 'pcm'"),
    ({"merging_threshold": 0.5}, 400, "0.86"),
    ({"language": "xx"}, 400, "language code"),
    ({"num_inference_steps": 10**9}, 400, "num_inference_steps: "),
    ({"sed": 1}, 400, "sed: "),
]


@pytest.mark.parametrize(("values", "status", "message"), NONSENSE)
def test_nonsense_is_refused_in_words(served, values, status, message):
    answer = served.speak(**values)
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert "repository/" not in answer.text  # no paths


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'{"a":' * 10_000])
def test_broken_json_is_refused(served, content):
    answer = served.http.post("/v1/audio/speech", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]
    assert served.speak().status_code == 200


def test_one_bad_text_does_not_harm_its_batch(start, monkeypatch, tts):
    server = start()
    held = Held(server, monkeypatch)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.speak)
        held.held.wait(20)
        bad = clients.submit(server.speak, input="...")
        good = clients.submit(server.speak, seed=5)
        until(lambda: server.metric("flexicodec_jobs ") == 3)
        held.release()
        assert (first.result().status_code, bad.result().status_code) == (200, 400)
        assert_is(good.result().content, tts(TEXT, seed=5)["audio"])


def test_with_a_key_nothing_is_answered_without_it(start):
    server = start(api_key="secret")
    for method, path in (
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/models"),
        ("POST", "/v1/audio/speech"),
        ("GET", "/nothing"),
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = server.http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health", headers={"authorization": "Bearer secret"}).status_code == 200
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
    assert client.audio.speech.create(model="repository", input=TEXT, voice="default").content


def test_pages_of_other_sites_are_refused(served):
    assert served.http.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert served.http.get("/v1/models", headers={"origin": served.url}).status_code == 200


def test_large_bodies_are_refused(start):
    server = start(max_body=1)
    large = b"x" * 1_100_000
    assert server.http.post("/v1/audio/tokens", files={"file": large}).status_code == 413
    chunks = (large[i : i + 10_000] for i in range(0, len(large), 10_000))  # without a length in the header
    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/audio/speech", content=chunks, headers=headers).status_code == 413


def recording() -> bytes:
    voice, rate = soundfile.read(AUDIO / "librivox_austen_0890.flac", dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, voice[: 2 * rate], rate, format="WAV")
    return file.getvalue()


def test_voices_are_added_kept_and_deleted(start, tts, tmp_path):
    server = start(voices_dir=tmp_path / "voices")

    def names(one):
        return [voice["id"] for voice in one.http.get("/v1/audio/voices").json()["data"]]

    def add(name, text="What I say.", audio=None):
        files = {"audio_sample": audio or recording()}
        return server.http.post("/v1/audio/voices", data={"name": name, "text": text}, files=files)

    assert names(server) == ["default", "anna", "ben"]
    assert server.speak(voice="default").content == server.speak(voice="anna").content
    assert add("me").json()["id"] == "me" and names(server)[-1] == "me"
    saved = FlexiCodecVoice.load(tmp_path / "voices" / "me.safetensors")
    assert_is(server.speak(voice="me").content, tts(TEXT, voice=saved, seed=0)["audio"])

    for name in ("../me", "a/b", "", "Me", "x" * 65, ".hidden", "me.safetensors"):
        assert add(name).status_code == 400
    for name in ("me", "anna", "default"):
        assert add(name).status_code == 409
    assert add("empty", audio=b"RIFF").status_code == 400
    assert "no audio file" in add("text", audio=b"hello").json()["error"]["message"]
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(16_000 * 40), 16_000, format="FLAC")
    assert "up to 30 s" in add("long", audio=silence.getvalue()).json()["error"]["message"]
    assert add("nothing", text="...").status_code == 400
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["me.safetensors"]

    again = start(voices_dir=tmp_path / "voices")
    assert names(again)[-1] == "me" and again.speak(voice="me").content == server.speak(voice="me").content
    assert server.http.delete("/v1/audio/voices/anna").status_code == 403
    assert server.http.delete("/v1/audio/voices/nobody").status_code == 400
    assert server.http.delete("/v1/audio/voices/..%2f..%2fme").status_code in (400, 404)
    assert server.http.delete("/v1/audio/voices/me").json()["deleted"]
    assert "me" not in names(server) and not list((tmp_path / "voices").iterdir())


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, RateSetting(0.91)),
        ({"target_frame_rate": 6.25}, RateSetting(target_frame_rate=6.25)),
        ({"merging_threshold": 0.8, "num_quantizers": 2}, RateSetting(0.8)),
    ],
)
def test_audio_becomes_tokens_and_audio_again(served, runner, settings, rate, tmp_path):
    from flexicodec_hf.audio_flexicodec import read_audio
    from flexicodec_hf.data.tokens import TokenSource

    path = AUDIO / "stereo_44k.flac"
    config = runner.config
    if not settings:
        rate = RateSetting(config.merging_threshold)
    ((expected,),) = runner.encode([read_audio(path, config.sampling_rate)], [rate], settings.get("num_quantizers"))

    def encode(**more):
        return served.http.post("/v1/audio/tokens", data=settings | more, files={"file": path.read_bytes()})

    tokens = encode().json()
    assert tokens["audio_codes"] == expected.audio_codes.tolist()
    assert tokens["token_lengths"] == expected.token_lengths.tolist()
    assert tokens["num_samples"] == expected.num_samples and tokens["model"] == "repository"
    saved = tmp_path / "tokens.safetensors"
    saved.write_bytes(encode(response_format="safetensors").content)
    assert TokenSource(saved, "x").read().settings == expected.settings | {"model": "repository"}

    (parts,) = runner.decode([expected])
    waveform = np.concatenate(list(parts))
    for body in ({"json": tokens}, {"content": saved.read_bytes()}):
        answer = served.http.post("/v1/audio/tokens/decode?response_format=pcm", **body)
        assert_is(answer.content, waveform)


class Chunks:
    """Stands in for the decoder of a codec: counts the chunks, and runs `before(number)` before each."""

    def __init__(self, server, monkeypatch, before=lambda number: None):
        decoder, self.number = server.engine.runner.codec.acoustic_decoder, 0
        decode = decoder.forward

        def counting(*args, **options):
            self.number += 1
            before(self.number)
            return decode(*args, **options)

        monkeypatch.setattr(decoder, "forward", counting)


@pytest.fixture(scope="module")
def long_tokens(served):
    """Those of 46.9 s, which are decoded in five chunks."""
    return served.http.post("/v1/audio/tokens", files={"file": (AUDIO / "librivox_long.flac").read_bytes()}).json()


def decoding(server, tokens, **query):
    return server.http.stream(
        "POST", "/v1/audio/tokens/decode", json=tokens, params={"response_format": "pcm"} | query
    )


def test_long_tokens_are_sent_while_they_are_decoded_and_let_others_pass(served, long_tokens, monkeypatch):
    asked, heard, spoken_at = threading.Event(), threading.Event(), []

    def before(number):
        assert {1: asked, 3: heard}.get(number, asked).wait(20)

    chunks = Chunks(served, monkeypatch, before)
    generate = served.engine.speaker.model.generate
    monkeypatch.setattr(
        served.engine.speaker.model, "generate", lambda **inputs: spoken_at.append(chunks.number) or generate(**inputs)
    )
    with ThreadPoolExecutor() as clients:
        speech = clients.submit(lambda: (until(lambda: chunks.number == 1), served.speak())[1])
        clients.submit(lambda: (until(lambda: served.metric("flexicodec_jobs ") == 2), asked.set()))
        with decoding(served, long_tokens) as response:
            assert response.headers["x-sampling-rate"] == "16000"
            parts = response.iter_bytes()
            audio = next(parts)  # while the third chunk cannot be decoded
            heard.set()
            audio += b"".join(parts)
        assert speech.result().status_code == 200
    assert spoken_at == [1] and chunks.number == 5
    monkeypatch.undo()
    codes, lengths = (torch.tensor(long_tokens[name])[None] for name in ("audio_codes", "token_lengths"))
    expected = served.engine.runner.codec.decode(codes, lengths, chunk_length_s=10.0).audio_values[0, 0]
    assert len(samples(audio)) == long_tokens["num_samples"]
    assert_is(audio[: 2 * len(expected)], expected.detach().numpy()[: long_tokens["num_samples"]])


def test_decoding_stops_when_the_client_leaves(served, long_tokens, monkeypatch):
    left = threading.Event()
    chunks = Chunks(served, monkeypatch, lambda number: number == 1 or left.wait(20))
    canceled = served.metric("flexicodec_canceled_total")
    with decoding(served, long_tokens) as response:
        next(response.iter_bytes())
    until(lambda: served.metric("flexicodec_canceled_total") == canceled + 1)
    left.set()
    until(lambda: served.metric("flexicodec_jobs ") == 0)
    assert chunks.number <= 2


def test_what_fails_while_it_is_sent_does_not_look_complete(served, long_tokens, monkeypatch):
    def before(number):
        if number == 2:
            raise ValueError("a chunk that cannot be decoded")

    Chunks(served, monkeypatch, before)
    with decoding(served, long_tokens) as response, pytest.raises(httpx.RemoteProtocolError):
        response.read()
    Chunks(served, monkeypatch, before)
    with decoding(served, long_tokens, stream_format="sse") as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.read().decode().strip().split("\n\n")]
    assert [event["type"] for event in events] == ["speech.audio.delta", "error"]
    assert events[-1]["error"]["message"] == "a chunk that cannot be decoded"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"merging_threshold": 0.9, "target_frame_rate": 6}, "not both"),
        ({"merging_threshold": 7}, "between -1 and 1"),
        ({"target_frame_rate": 100}, "between"),
        ({"target_frame_rate": "nan"}, "target_frame_rate: "),
        ({"num_quantizers": 99}, "`num_quantizers` must be 1 to"),
        ({"response_format": "xml"}, "response_format: "),
        ({"model": "other"}, "no model"),
    ],
)
def test_wrong_settings_of_tokens_are_refused(served, data, message):
    answer = served.http.post("/v1/audio/tokens", data=data, files={"file": recording()})
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"]


def test_wrong_tokens_are_refused(served):
    tokens = served.http.post("/v1/audio/tokens", files={"file": recording()}).json()

    def decode(**body):
        return served.http.post("/v1/audio/tokens/decode", **body)

    wrong = [
        {"json": tokens | {"token_lengths": tokens["token_lengths"][1:]}},
        {"json": tokens | {"audio_codes": [tokens["audio_codes"][0], [1]]}},
        {"json": tokens | {"audio_codes": []}},
        {"json": tokens | {"audio_codes": [[10**8] * len(row) for row in tokens["audio_codes"]]}},
        {"json": tokens | {"sampling_rate": 8000}},
        {"json": tokens | {"num_samples": 10**12}},
        {"json": {}},
        {"content": b"no tensors"},
        {"content": (10**9).to_bytes(8, "little") + b"{}"},
    ]
    for body in wrong:
        answer = decode(**body)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body
        assert "/tmp" not in answer.text
    assert decode(json=tokens).status_code == 200


def test_a_codec_alone_serves_tokens(start, codec_dir):
    server = start(codec_dir(), model_name="repository")
    assert server.http.post("/v1/audio/tokens", files={"file": recording()}).status_code == 200
    answer = server.speak()
    assert answer.status_code == 400 and "codec alone" in answer.json()["error"]["message"]
    assert server.http.get("/v1/audio/voices").json()["data"] == []


def test_shutdown_lets_running_answers_end(repository, monkeypatch):
    server = Served(repository)
    held = Held(server, monkeypatch)
    with ThreadPoolExecutor() as clients:
        answer = clients.submit(server.speak)
        held.held.wait(20)
        server.server.should_exit = True
        held.release()
        assert answer.result().status_code == 200
    server.thread.join(20)
    assert not server.thread.is_alive() and not server.engine._thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        server.speak()


def test_the_page_runs(start, repository, tmp_path, monkeypatch):
    page = (TESTS.parent / "docs" / "serving.md").read_text()
    server = start(model_name="flexicodec")
    monkeypatch.chdir(tmp_path)
    Path("me.wav").write_bytes(recording())
    shutil.copy(AUDIO / "librivox_austen_0880.flac", "speech.flac")
    page = page.replace("http://127.0.0.1:8000", server.url)
    for script in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(script, "serving.md", "exec"), {})
    commands = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    for command in (line for block in commands for line in block.splitlines() if line.startswith("curl")):
        subprocess.run([*shlex.split(command), "--fail", "-s"], check=True)
    assert soundfile.info("hello.wav").samplerate == 24_000
    written = soundfile.info("decoded.wav")
    assert written.samplerate == 16_000
    # What the options are said to be by default.
    parser = argparse.ArgumentParser()
    serve.add_commands(parser.add_subparsers())
    defaults = vars(parser.parse_args(["serve"]))
    said = re.findall(r"`--([a-z-]+) (\d+)`", page)
    assert len(set(said)) == 6
    for name, value in said:
        if name != "batch-size":
            assert defaults[name.replace("-", "_")] == float(value)


@pytest.mark.slow
def test_64_clients_for_minutes(tmp_path):
    """On the small checkpoint, through the command line; prints the figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", TESTS.parent / "checkpoints" / "flexicodec-tiny", "--port", port]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "flexicodec_hf.cli", *map(str, words)], stdout=log, stderr=subprocess.STDOUT
    )
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=httpx.Limits(max_connections=80))

    def ready():
        try:
            return http.get("/health").status_code == 200
        except httpx.ConnectError:
            return False

    def memory():
        status = Path(f"/proc/{server.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def ask(text, seed):
        body = {"model": "flexicodec-tiny", "input": text, "response_format": "pcm", "seed": seed}
        start = time.monotonic()
        with http.stream("POST", "/v1/audio/speech", json=body) as response:
            assert response.status_code == 200, response.read()
            parts = response.iter_bytes()
            audio = next(parts)
            first = time.monotonic() - start
            return audio + b"".join(parts), first

    try:
        until(ready, 120)
        texts = ("Good morning.", "I hope you will be very happy in your new house.", "It was late. The sea was calm.")
        alone = {(text, seed): ask(text, seed)[0] for text in texts for seed in range(4)}
        firsts, sizes, seconds = [], [], 150.0
        end = time.monotonic() + seconds

        def client(number):
            turn = number
            while time.monotonic() < end:
                key = texts[turn % 3], turn // 3 % 4
                audio, first = ask(*key)
                assert len(audio) == len(alone[key])
                np.testing.assert_allclose(samples(audio), samples(alone[key]), atol=5e-3)
                firsts.append(first)
                turn += 1

        with ThreadPoolExecutor(64) as clients:
            running = [clients.submit(client, number) for number in range(64)]
            time.sleep(20)
            while time.monotonic() < end:
                sizes.append(memory())
                time.sleep(5)
            for one in running:
                one.result()
        quantiles = statistics.quantiles(firsts, n=20)
        print(
            f"64 clients, {seconds:.0f} s: {len(firsts)} requests, none lost or mixed up; first audio p50 "
            f"{quantiles[9]:.2f} s, p95 {quantiles[18]:.2f} s; memory {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, at most "
            f"{max(sizes):.0f}"
        )
        # Not a Python object more; the kernels of PyTorch keep memory for each shape that they have seen.
        assert max(sizes) < sizes[0] + 200
    finally:
        server.terminate()
        server.wait(60)
        log.close()
