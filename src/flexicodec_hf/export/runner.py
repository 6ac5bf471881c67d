"""Exported models without PyTorch: speech to tokens, tokens to speech, and text to speech, on NumPy and ONNX Runtime.

`flexicodec-hf export` puts this module, and those that it imports, beside the graphs, as the package
`flexicodec_onnx`. Run in that directory:

    python -m flexicodec_onnx encode clip.wav tokens.safetensors
    python -m flexicodec_onnx decode tokens.safetensors decoded.wav
    python -m flexicodec_onnx speak "Hello there." hello.wav

It needs numpy, onnxruntime, safetensors, soundfile and soxr; for text also tokenizers, num2words, phonemizer and
espeakng-loader.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..audio_flexicodec import read_audio, write_audio
from ..text_flexicodec import prepare_text


# Relative keys are projected for a multiple of this length.
_KEY_BLOCK = 256


class Tokens(NamedTuple):
    """
    The tokens of a clip.

    Args:
        audio_codes: `(num_quantizers, num_tokens)`, int64.
        token_lengths: `(num_tokens,)`, int64, codec frames (80 ms) of each token.
        merging_threshold: The threshold that merged the frames.
    """

    audio_codes: np.ndarray
    token_lengths: np.ndarray
    merging_threshold: float


class FlexiCodecOnnx:
    """
    The codec, and text to speech if it was exported.

    Args:
        directory: What `flexicodec-hf export` wrote.
        num_threads: Of ONNX Runtime; 0 is one for each core.
        providers: Of ONNX Runtime, such as `["CUDAExecutionProvider"]`.
    """

    def __init__(
        self, directory: str | Path, num_threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ):
        self.directory = Path(directory)
        self.settings = json.loads((self.directory / "settings.json").read_text(encoding="utf-8"))
        self.speech: dict[str, Any] | None = self.settings.get("tts")
        self._features = _tensors(self.directory / "features.safetensors")[0]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads

        @cache
        def session(name: str) -> onnxruntime.InferenceSession:
            path = self.directory / f"{name}.onnx"
            return onnxruntime.InferenceSession(path, options, providers=list(providers))

        self._session = session

    def run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs of a graph."""
        return self._session(graph).run(None, inputs)

    # Speech to tokens, tokens to speech

    def encode(
        self, waveform: np.ndarray, merging_threshold: float | None = None, target_frame_rate: float | None = None
    ) -> Tokens:
        """
        Turn speech into tokens.

        Args:
            waveform: `(num_samples,)`, floats in [-1, 1] at `settings["sampling_rate"]`.
            merging_threshold: Cosine similarity above which neighboring frames share a token; by default the model's.
            target_frame_rate: Average tokens per second to aim at, instead of a threshold.

        Raises:
            ValueError: The waveform is too short, too long or not finite, or both numbers are given or one is out of
                its range.
        """
        settings = self.settings
        features = self.features(waveform)
        if len(features) > settings["max_features"]:
            raise ValueError(
                f"The audio has {len(features)} features of 60 ms, and the semantic encoder reads at most "
                f"{settings['max_features']}: cut it."
            )
        num_frames = max(int(len(features) / settings["semantic_downsampling_factor"]), 1)
        (hidden_states,) = self.run("semantic_encoder", input_features=features[None])
        semantic_frames = _resample(hidden_states[0], num_frames)

        hop_length = settings["hop_length"]
        padded = np.pad(waveform.astype(np.float32), (0, -len(waveform) % hop_length))
        (acoustic_frames,) = self.run("acoustic_encoder", input_values=padded.reshape(1, -1, hop_length))

        threshold = self._threshold(similarities(semantic_frames), merging_threshold, target_frame_rate)
        lengths = merge(similarities(semantic_frames), threshold, settings["max_frames_per_token"])
        (codes,) = self.run(
            "quantizer",
            semantic_frames=semantic_frames[None],
            acoustic_frames=acoustic_frames[:, :num_frames],
            token_lengths=lengths[None],
        )
        return Tokens(codes[0], lengths, float(threshold))

    def decode(self, audio_codes: np.ndarray, token_lengths: np.ndarray) -> np.ndarray:
        """
        Turn tokens into speech.

        Args:
            audio_codes: `(num_quantizers, num_tokens)`; fewer codebooks than the model has are fine.
            token_lengths: `(num_tokens,)`, codec frames of each token.

        Returns:
            `(num_samples,)` at `settings["sampling_rate"]`, 1280 samples per frame, less 16.

        Raises:
            ValueError: Shapes do not fit each other, or a code or length is out of its range.
        """
        self._check_tokens(audio_codes, token_lengths)
        return self._decode("", audio_codes, token_lengths)

    def _decode(self, folder: str, audio_codes: np.ndarray, token_lengths: np.ndarray) -> np.ndarray:
        codes = np.full((1, self.settings["num_quantizers"], audio_codes.shape[1]), -1, dtype=np.int64)
        codes[0, : len(audio_codes)] = audio_codes
        (latents,) = self.run(f"{folder}dequantizer", audio_codes=codes)
        return self.run(f"{folder}decoder", frames=np.repeat(latents, token_lengths, axis=1))[0][0]

    def _check_tokens(self, codes: np.ndarray, lengths: np.ndarray) -> None:
        settings = self.settings
        if codes.ndim != 2 or not 1 <= len(codes) <= settings["num_quantizers"] or lengths.shape != codes.shape[1:]:
            raise ValueError(
                "`audio_codes` and `token_lengths` must have the shapes (num_quantizers, num_tokens) and "
                f"(num_tokens,), with 1 to {settings['num_quantizers']} codebooks, got {codes.shape} and "
                f"{lengths.shape}."
            )
        if lengths.size == 0 or lengths.min() < 1 or lengths.max() > settings["max_frames_per_token"]:
            raise ValueError(
                f"`token_lengths` must be 1 to {settings['max_frames_per_token']}, at least one, got {lengths}."
            )
        sizes = np.full(len(codes), settings["codebook_size"])
        sizes[0] = settings["semantic_codebook_size"]
        if ((codes < 0) | (codes >= sizes[:, None])).any():
            raise ValueError(f"`audio_codes` must be at least 0 and below {sizes.tolist()}, by codebook.")

    def features(self, waveform: np.ndarray) -> np.ndarray:
        """Stacked log-mel features `(num_features, 560)` of a waveform, as of `FlexiCodecFeatureExtractor`."""
        settings, window = self.settings["features"], self._features["window"]
        if waveform.ndim != 1 or len(waveform) < len(window) or not np.isfinite(waveform).all():
            raise ValueError(
                f"The audio must be finite floats of shape (num_samples,), at least {len(window)}, got "
                f"{waveform.shape}."
            )
        samples = waveform.astype(np.float32) * np.float32(32768)
        frames = np.lib.stride_tricks.sliding_window_view(samples, len(window))[:: settings["frame_shift"]]
        frames = frames - frames.mean(axis=1, keepdims=True)
        previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        filters = self._features["filters"]
        spectrum = np.fft.rfft((frames - np.float32(0.97) * previous) * window, 2 * len(filters))
        power = (np.abs(spectrum[:, :-1]) ** 2).astype(np.float32)
        fbank = np.log(np.maximum(power @ filters, np.finfo(np.float32).eps))

        size, stride = settings["num_stacked_frames"], settings["stack_stride"]
        num_stacks = math.ceil(len(fbank) / stride)
        # The first and the last frame are repeated beyond the edges.
        index = np.arange(num_stacks)[:, None] * stride + np.arange(size) - (size - 1) // 2
        stacks = fbank[index.clip(0, len(fbank) - 1)].reshape(num_stacks, -1)
        return (stacks + self._features["cmvn_shift"]) * self._features["cmvn_scale"]

    def _threshold(
        self, similarities: np.ndarray, merging_threshold: float | None, target_frame_rate: float | None
    ) -> np.float32:
        settings = self.settings
        if target_frame_rate is None:
            threshold = settings["merging_threshold"] if merging_threshold is None else merging_threshold
            if not -1 <= threshold <= 1:
                raise ValueError(f"`merging_threshold` is a cosine, between -1 and 1, got {threshold}.")
            return np.float32(threshold)
        lowest = settings["frame_rate"] / settings["max_frames_per_token"]
        if merging_threshold is not None or not lowest <= target_frame_rate <= settings["frame_rate"]:
            raise ValueError(
                f"`target_frame_rate` must be between {lowest} and {settings['frame_rate']} tokens per second, "
                f"without a `merging_threshold`, got {target_frame_rate} and {merging_threshold}."
            )
        target = float(np.float32(target_frame_rate) / np.float32(settings["frame_rate"]) * (len(similarities) + 1))
        return threshold_for_tokens(similarities, target, settings["max_frames_per_token"])

    # Text to speech

    def speak(
        self,
        text: str,
        voice: str | None = None,
        language: str | None = None,
        phonemes: bool = True,
        seed: int | None = None,
        noise: np.ndarray | None = None,
        **settings: Any,
    ) -> tuple[np.ndarray, int]:
        """
        Speak a sentence or a few.

        The random numbers are NumPy's: a seed gives other speech than the same seed with PyTorch.

        Args:
            text: What to say.
            voice: One of `settings["tts"]["voices"]`; by default the first.
            language: Whisper's code; by default the model's.
            phonemes: Whether English is spoken from phonemes.
            seed: Makes the call repeatable.
            noise: What the flow starts from, `(num_frames, num_mel_bins)`; drawn by default.
            settings: In place of `settings["tts"]["generation"]`: `do_sample`, `temperature`, `top_k`,
                `max_new_tokens`, `merging_threshold`, `num_inference_steps`, `guidance_scale`, ...

        Returns:
            The waveform `(num_samples,)`, and its sampling rate in hertz.

        Raises:
            ValueError: The directory has no text to speech, an argument is unknown, or no speech was generated.
        """
        if self.speech is None:
            raise ValueError(f"{self.directory} holds the codec alone: export a repository that can speak.")
        generation = self.speech["generation"]
        if unknown := settings.keys() - generation.keys():
            raise ValueError(f"Unknown settings {sorted(unknown)}: there are {sorted(generation)}.")
        generation = generation | settings
        random = np.random.default_rng(seed)
        speaker = self._voice(voice, generation["merging_threshold"])
        text_ids = self.text_ids(text, language, phonemes, speaker.get("text_ids"))
        codes, lengths = self.generate_tokens(text_ids, speaker, generation, random)
        if lengths.sum() == 0:
            raise ValueError("The model generated no speech: try another seed, or a longer text.")
        if "voicebox" not in self.speech:
            return self._decode("tts/", codes[None], lengths), self.speech["sampling_rate"]
        mel = self.sample_mel(codes, lengths, speaker, generation, random, noise)
        if self.speech["voicebox"]["latent_mean"] is None:
            (waveform,) = self.run("tts/vocoder", mel=mel[None])
        else:
            (waveform,) = self.run("tts/decoder", frames=mel[None])
        return waveform[0], self.speech["sampling_rate"]

    def text_ids(self, text: str, language: str | None, phonemes: bool, said: np.ndarray | None) -> np.ndarray:
        """Ids that the model reads: the language, what the voice's recording says, and the text."""
        from tokenizers import Tokenizer

        assert self.speech is not None
        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        language = language or self.speech["language"]
        prefix = tokenizer.token_to_id(f"<|{language}|>")
        if prefix is None:
            raise ValueError(f"The tokenizer knows no language {language!r}.")
        spoken = prepare_text(text, language, phonemes=phonemes)
        if said is None:
            return np.array([prefix, *tokenizer.encode(spoken, add_special_tokens=False).ids])
        return np.array([prefix, *said, *tokenizer.encode(f" {spoken}", add_special_tokens=False).ids])

    def generate_tokens(
        self,
        text_ids: np.ndarray,
        voice: dict[str, np.ndarray],
        generation: dict[str, Any],
        random: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Semantic codes and lengths in codec frames, both `(num_tokens,)`, of a text after a voice."""
        assert self.speech is not None
        settings = self.speech["ar"]
        end, offset = settings["end_token_id"], settings["text_token_offset"]
        threshold, known = generation["merging_threshold"], settings["threshold_token_ids"]
        threshold_ids = [known[one] for one in known if abs(float(one) - threshold) < 1e-6]
        if known and not threshold_ids:
            raise ValueError(f"`merging_threshold` is {threshold}, but the model was trained with {list(known)}.")
        threshold_id = threshold_ids[0] if known else settings["no_threshold_token_id"]
        prompt = voice.get("codes", np.zeros(0, dtype=np.int64))
        start = [settings["start_token_id"], threshold_id]
        ids = np.concatenate([start, text_ids + offset, [settings["task_token_id"]], prompt])
        previous = np.zeros(len(ids) + 1, dtype=np.int64)
        previous[len(previous) - len(prompt) :] = voice.get("token_lengths", prompt)
        text_states = np.zeros((1, len(ids), settings["hidden_size"]), dtype=np.float32)
        (text_states[:, 2 : 2 + len(text_ids)],) = self.run("tts/ar_text", text_ids=text_ids[None])

        step = self._stepper()
        logits, _ = step(ids, previous[:-1], text_states)
        last_length = previous[-1]
        fewest = max(generation["min_new_tokens"], int(len(text_ids) * generation["min_token_text_ratio"]))
        most = min(generation["max_new_tokens"], int(len(text_ids) * generation["max_token_text_ratio"]))
        no_text = np.zeros((1, 1, settings["hidden_size"]), dtype=np.float32)
        codes: list[int] = []
        lengths: list[int] = []
        while len(codes) < most:
            if len(codes) < fewest:
                logits[end] = -np.inf
            code = draw(logits, generation, random)
            if code == end:
                break
            logits, duration_logits = step(np.array([code]), np.array([last_length]), no_text)
            durations = {name: generation[f"duration_{name}"] for name in ("temperature", "top_k")}
            last_length = draw(duration_logits, durations | {"do_sample": generation["do_sample"]}, random)
            codes.append(code)
            lengths.append(last_length)
        return np.array(codes, dtype=np.int64), np.array(lengths, dtype=np.int64)

    def _stepper(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """A function that reads ids `(n,)` after those that it has read, and returns the logits of the last one."""
        assert self.speech is not None
        settings = self.speech["ar"]
        heads = settings["num_attention_heads"]
        size = settings["hidden_size"] // heads
        empty = np.zeros((settings["num_hidden_layers"], 1, heads, 0, size), dtype=np.float32)
        past = [empty, empty]
        relative_keys = empty[:, 0]

        def step(ids: np.ndarray, previous: np.ndarray, text_states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal relative_keys
            length = past[0].shape[3] + len(ids)
            if relative_keys.shape[2] < length:
                positions = np.arange(_KEY_BLOCK * math.ceil(length / _KEY_BLOCK))
                (relative_keys,) = self.run("tts/ar_positions", positions=positions)
            logits, duration_logits, *past[:] = self.run(
                "tts/ar_decoder",
                input_ids=ids[None],
                previous_lengths=previous[None],
                text_states=text_states,
                relative_keys=relative_keys,
                past_keys=past[0],
                past_values=past[1],
            )
            return logits[0], duration_logits[0]

        return step

    def sample_mel(
        self,
        codes: np.ndarray,
        token_lengths: np.ndarray,
        voice: dict[str, np.ndarray],
        generation: dict[str, Any],
        random: np.random.Generator,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:
        """Mel spectrogram, or latents, `(num_frames, num_mel_bins)` of tokens, by the flow of the Voicebox."""
        assert self.speech is not None
        settings = self.speech["voicebox"]
        factor, num_bins = settings["upsample_factor"], settings["num_mel_bins"]
        mean, std = (
            np.asarray(settings[name] or default, dtype=np.float32)
            for name, default in (("latent_mean", 0.0), ("latent_std", 1.0))
        )
        frame_codes = np.repeat(codes, token_lengths * factor)
        prompt_codes, prompt = np.zeros(0, dtype=np.int64), np.zeros((0, num_bins), dtype=np.float32)
        if "mel" in voice:
            prompt_codes = np.repeat(voice["codes"], voice["token_lengths"] * factor)
            length = min(len(prompt_codes), len(voice["mel"]))
            prompt_codes, prompt = prompt_codes[:length], ((voice["mel"] - mean) / std)[:length]

        def velocity(mel: np.ndarray, timestep: np.float32, is_conditional: bool) -> np.ndarray:
            before = (prompt_codes, prompt) if is_conditional else (prompt_codes[:0], prompt[:0])
            (result,) = self.run(
                "tts/voicebox",
                codes=np.concatenate([before[0], frame_codes])[None],
                is_conditional=np.full(1, is_conditional, dtype=np.float32),
                mel=np.concatenate([before[1], mel])[None],
                timestep=np.full(1, timestep),
            )
            return result[0, len(before[0]) :]

        steps, scale, rescale = (
            generation[name] for name in ("num_inference_steps", "guidance_scale", "guidance_rescale")
        )
        shape = (len(frame_codes), num_bins)
        mel = random.standard_normal(shape, dtype=np.float32) if noise is None else noise
        if mel.shape != shape:
            raise ValueError(f"`noise` has the shape {mel.shape}, expected {shape}.")
        times = np.arange(steps + 1, dtype=np.float32) / np.float32(steps)
        for start, stop in itertools.pairwise(times):
            middle = (start + stop) / 2
            conditional = guided = velocity(mel, middle, True)
            if scale:
                guided = conditional + scale * (conditional - velocity(mel, middle, False))
                ratio = conditional.std(ddof=1) / guided.std(ddof=1)
                guided = guided * np.float32(rescale * ratio + 1 - rescale)
            mel = mel + (stop - start) * guided
        return mel * std + mean

    def _voice(self, name: str | None, merging_threshold: float) -> dict[str, np.ndarray]:
        """The tokens of a voice at a threshold, its mel spectrogram and text; nothing in a model without voices."""
        assert self.speech is not None
        voices = self.speech["voices"]
        if name is None and not voices:
            return {}
        name = voices[0] if name is None else name
        if name not in voices:
            raise ValueError(f"There is no voice {name!r}: this model has {voices or 'none'}.")
        tensors, _ = _tensors(self.directory / "voices" / f"{name}.safetensors")
        for key in tensors:
            kind, _, threshold = key.partition("/")
            if kind == "audio_codes" and abs(float(threshold) - merging_threshold) < 1e-6:
                voice = {"codes": tensors[key], "token_lengths": tensors[f"token_lengths/{threshold}"]}
                voice = {part: values.astype(np.int64) for part, values in voice.items()}
                return voice | {part: tensors[part] for part in ("mel", "text_ids") if part in tensors}
        raise ValueError(f"The voice {name!r} has no tokens at `merging_threshold`={merging_threshold}.")


def similarities(frames: np.ndarray) -> np.ndarray:
    """Cosine similarity of each frame `(num_frames, size)` with the next, at most 1."""
    unit = frames / np.linalg.norm(frames, axis=-1, keepdims=True)
    return np.minimum((unit[:-1] * unit[1:]).sum(axis=-1), np.float32(1))


def merge(similarities: np.ndarray, threshold: np.float32, longest: int) -> np.ndarray:
    """Frames of each token, `(num_tokens,)`: neighbors above the threshold, up to `longest` of them."""
    lengths = [1]
    for is_similar in similarities > threshold:
        if is_similar and lengths[-1] < longest:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return np.array(lengths, dtype=np.int64)


def threshold_for_tokens(similarities: np.ndarray, target: float, longest: int) -> np.float32:
    """The threshold that comes closest to a number of tokens: half way between two similarities."""
    candidates = np.concatenate([np.full(1, -1, dtype=np.float32), np.sort(similarities)])
    low, high = 0, len(candidates) - 1
    while low < high:  # the number of tokens never falls as the threshold rises
        middle = (low + high) // 2
        if len(merge(similarities, candidates[middle], longest)) >= target:
            high = middle
        else:
            low = middle + 1
    below = max(high - 1, 0)
    counts = [len(merge(similarities, candidates[index], longest)) for index in (below, high)]
    best = below if abs(target - counts[0]) < abs(counts[1] - target) else high
    following = np.float32(1) if best + 1 == len(candidates) else candidates[best + 1]
    middle_value = (candidates[best] + following) / np.float32(2)
    return middle_value if middle_value < following else candidates[best]


def draw(logits: np.ndarray, generation: dict[str, Any], random: np.random.Generator) -> int:
    """An index `(num_choices,)`: the likeliest, or one of the `top_k` likeliest by chance."""
    if not generation["do_sample"] or generation["top_k"] == 1:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / generation["temperature"]
    if generation["top_k"]:
        scores[scores < np.sort(scores)[-min(generation["top_k"], len(scores))]] = -np.inf
    weights = np.exp(scores - scores.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))


def _resample(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """Linear interpolation of `(length, size)` to `(num_frames, size)`, in float32 as in the model."""
    scale = np.float32(len(frames)) / np.float32(num_frames)
    source = ((np.arange(num_frames) + np.float32(0.5)).astype(np.float32) * scale - np.float32(0.5)).clip(0)
    left = np.minimum(source.astype(np.int64), len(frames) - 1)
    right = np.minimum(left + 1, len(frames) - 1)
    weight = (source - left.astype(np.float32)).clip(None, 1)[:, None]
    return frames[left] * (1 - weight) + frames[right] * weight


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no safetensors file that can be read: {error}") from error


def _encode(model: FlexiCodecOnnx, args: argparse.Namespace) -> str:
    rate = model.settings["sampling_rate"]
    clip = read_audio(args.input, rate)
    tokens = model.encode(clip.waveform, args.merging_threshold, args.target_frame_rate)
    numbers = {
        "num_samples": clip.num_samples,
        "sampling_rate": rate,
        "frame_rate": model.settings["frame_rate"],
        "merging_threshold": tokens.merging_threshold if args.merging_threshold is None else args.merging_threshold,
        "target_frame_rate": args.target_frame_rate,
        "num_quantizers": len(tokens.audio_codes),
        "model": model.settings["model"],
    }
    arrays = {"audio_codes": tokens.audio_codes, "token_lengths": tokens.token_lengths}
    save_file(
        {name: np.ascontiguousarray(array, dtype=np.int32) for name, array in arrays.items()},
        args.output,
        {name: str(value) for name, value in numbers.items() if value is not None},
    )
    return f"{tokens.audio_codes.shape[1]} tokens of {clip.seconds:.2f} s"


def _decode(model: FlexiCodecOnnx, args: argparse.Namespace) -> str:
    arrays, metadata = _tensors(args.input)
    if not {"audio_codes", "token_lengths"} <= arrays.keys() or not metadata.get("num_samples", "").isdigit():
        raise ValueError(f"{args.input}: not tokens from `encode`.")
    waveform = model.decode(arrays["audio_codes"], arrays["token_lengths"])
    # As long as the clip was: up to two frames were dropped at its end.
    waveform = waveform[: int(metadata["num_samples"])]
    waveform = np.pad(waveform, (0, int(metadata["num_samples"]) - len(waveform)))
    write_audio(args.output, waveform, model.settings["sampling_rate"])
    return f"{len(waveform) / model.settings['sampling_rate']:.2f} s"


def _speak(model: FlexiCodecOnnx, args: argparse.Namespace) -> str:
    names = ("merging_threshold", "temperature", "top_k", "num_inference_steps", "guidance_scale")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    waveform, rate = model.speak(
        args.input, args.voice, args.language, phonemes=not args.no_phonemes, seed=args.seed, **given
    )
    write_audio(args.output, waveform, rate)
    return f"{len(waveform) / rate:.2f} s at {rate} Hz"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="flexicodec_onnx", description="FlexiCodec on ONNX Runtime.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1], metavar="DIR", help="exported model")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime (default: one for each core)")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    encode = commands.add_parser("encode", help="an audio file to tokens")
    encode.add_argument("input", type=Path, metavar="AUDIO")
    encode.add_argument("output", type=Path, metavar="OUT.safetensors")
    rate = encode.add_mutually_exclusive_group()
    rate.add_argument("--merging-threshold", type=float, metavar="X")
    rate.add_argument("--target-frame-rate", type=float, metavar="HZ")
    encode.set_defaults(run=_encode)
    decode = commands.add_parser("decode", help="tokens to an audio file")
    decode.add_argument("input", type=Path, metavar="TOKENS")
    decode.add_argument("output", type=Path, metavar="OUT")
    decode.set_defaults(run=_decode)
    speak = commands.add_parser("speak", help="text to speech")
    speak.add_argument("input", metavar="TEXT")
    speak.add_argument("output", type=Path, metavar="OUT")
    speak.add_argument("--voice", metavar="NAME")
    speak.add_argument("--language", metavar="CODE")
    speak.add_argument("--no-phonemes", action="store_true")
    for name in ("seed", "top-k", "num-inference-steps"):
        speak.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("merging-threshold", "temperature", "guidance-scale"):
        speak.add_argument(f"--{name}", type=float, metavar="X")
    speak.set_defaults(run=_speak)
    args = parser.parse_args(argv)
    try:
        print(f"{args.output}: {args.run(FlexiCodecOnnx(args.model, args.threads), args)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0
