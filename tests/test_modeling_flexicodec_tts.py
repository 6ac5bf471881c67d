"""The whole text-to-speech system, on the reference's tiny models."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForTextToWaveform,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TorchAoConfig,
    pipeline,
)

from conftest import AUDIO, assert_close
from flexicodec_hf import (
    FlexiCodecARConfig,
    FlexiCodecARForConditionalGeneration,
    FlexiCodecFeatureExtractor,
    FlexiCodecForTextToSpeech,
    FlexiCodecModel,
    FlexiCodecTTSConfig,
    FlexiCodecTTSProcessor,
    FlexiCodecVoice,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
    save_repository,
)
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.chunking_flexicodec import fade_in
from flexicodec_hf.generation_flexicodec_voicebox import FlexiCodecVoiceboxSampleOutput


TEXTS = ["Hello there.", "Good morning to all of you!"]
CLIPS = [
    {"array": read_audio(AUDIO / f"librivox_austen_{name}.flac", 16_000).waveform[:24_000], "sampling_rate": 16_000}
    for name in ("0920", "0870")
]


@pytest.fixture(scope="module")
def processor(tts_repository):
    return FlexiCodecTTSProcessor.from_pretrained(tts_repository)


@pytest.fixture(scope="module")
def loaded(tts_repository):
    return FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts")


@pytest.fixture
def model(loaded, device):
    return loaded.to(device)


def speak(model, inputs, **kwargs):
    return model.generate(**inputs.to(model.device), return_dict_in_generate=True, **({"seed": 1} | kwargs))


def assert_same_speech(one, other, row=0, other_row=0):
    """Item `row` of an output says what item `other_row` of another does, up to padding."""
    for mask, names in (("audio_codes_mask", ("token_lengths", "audio_codes")), ("padding_mask", ("audio",))):
        size = int(one[mask][row].sum())
        assert size == int(other[mask][other_row].sum()) > 0
        for name in names:
            assert_close(one[name][row, ..., :size], other[name][other_row, ..., :size].cpu(), atol=1e-5)


def waveform(output, row=0):
    """Item `row` of an output without padding."""
    return output.audio[row, 0, output.padding_mask[row]].cpu()


def test_parity_with_the_reference(golden, tts_parts, device):
    fixture = golden("tts")
    model = FlexiCodecForTextToSpeech.from_parts_pretrained(
        *(tts_parts / part for part in ("codec", "ar", "voicebox", "vocoder"))
    ).to(device)
    extractor = FlexiCodecFeatureExtractor.from_pretrained(tts_parts / "codec")
    recording = extractor(fixture["in/ref_wave"][0].numpy(), sampling_rate=16_000, return_tensors="pt")
    voice = model.encode_voice(
        **{f"reference_{name}": tensor for name, tensor in recording.items()}, reference_mel=fixture["nar/prompt_mel"]
    )
    for threshold, codes, lengths in (
        (fixture.spec["ar_framerate"], "ar/prompt_speech_token", "ar/prompt_token_lengths"),
        (fixture.spec["nar_framerate"], "nar/prompt_codes_aggregated", "nar/prompt_token_lengths"),
    ):
        assert voice.tokens_at(threshold)[0].tolist() == fixture[codes].flatten().tolist()
        assert voice.tokens_at(threshold)[1].tolist() == fixture[lengths].flatten().tolist()

    output = model.generate(
        fixture["in/text_ids"][None].to(device),
        voice=voice,
        merging_threshold=fixture.spec["ar_framerate"],
        do_sample=False,
        max_token_text_ratio=fixture.spec["max_token_text_ratio"],
        use_nar=False,
        return_dict_in_generate=True,
    )
    assert output.audio_codes[:, 0].tolist() == fixture["ar/speech_tokens"].tolist()
    assert output.token_lengths.tolist() == fixture["ar/duration_classes"].tolist()
    assert output.sampling_rate.tolist() == [16_000]
    assert_close(output.audio, fixture["ar/codec_only_audio"])

    # The reference's second stage cuts the first frame of its target for the 65th of the prompt.
    spoken = model.decode_speech(
        output.audio_codes, output.token_lengths, voice=voice, merging_threshold=fixture.spec["nar_framerate"], seed=0
    )
    assert spoken.sampling_rate.tolist() == [24_000]
    assert spoken.audio.shape[2] == fixture["nar/audio_24k"].shape[0] + 480


def test_second_stage_is_voicebox_and_vocoder(model, processor):
    output = speak(model, processor("Hello there."), seed=5, num_inference_steps=3, guidance_scale=1.5)
    voice = model.voices["anna"]
    codes, lengths = (tensor[None].to(model.device) for tensor in voice.tokens_at(0.91))
    numbers = torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(5)).tolist()
    sampled = model.voicebox.sample(
        output.audio_codes[:, 0],
        output.token_lengths,
        codes,
        lengths,
        voice.mel[None].to(model.device),
        num_inference_steps=3,
        guidance_scale=1.5,
        generator=[torch.Generator().manual_seed(numbers[1])],
    )
    assert_close(output.audio, model.vocoder(sampled.mel).audio_values.detach().cpu(), atol=1e-5)
    assert output.audio.shape == (1, 1, 1920 * int(output.token_lengths.sum()))


def test_a_preset_is_settings_of_the_flow_by_name(model, processor, monkeypatch):
    calls, sample = [], model.voicebox.sample
    monkeypatch.setattr(
        model.voicebox, "sample", lambda *args, **kwargs: calls.append(kwargs) or sample(*args, **kwargs)
    )
    inputs = processor("Hello there.")
    fast = speak(model, inputs, preset="fast")
    speak(model, inputs, preset="fast", num_inference_steps=5, guidance_interval=(0.1, 1))
    speak(model, inputs)
    chosen = [(call["num_inference_steps"], call["time_grid"], tuple(call["guidance_interval"])) for call in calls]
    assert chosen == [(7, "epss", (0, 1)), (5, "epss", (0.1, 1)), (2, "uniform", (0, 1))]
    assert_same_speech(fast, speak(model, inputs, num_inference_steps=7, time_grid="epss"))
    with pytest.raises(ValueError, match=r"`preset`='faster' is not known: there is \['fast'\]"):
        speak(model, inputs, preset="faster")


@pytest.mark.parametrize("use_nar", [True, False])
@pytest.mark.parametrize("do_sample", [True, False])
def test_batch_equals_single_items(model, processor, use_nar, do_sample):
    options = {"use_nar": use_nar, "do_sample": do_sample, "duration_top_k": 3}
    voices = ["ben", "anna"]
    together = speak(model, processor(TEXTS), voice=voices, **options)
    for item, (text, voice) in enumerate(zip(TEXTS, voices, strict=True)):
        assert_same_speech(speak(model, processor(text), voice=voice, **options), together, 0, item)
    assert together.padding_mask.shape == together.audio[:, 0].shape
    assert not together.audio[:, 0][~together.padding_mask].any()
    assert together.sampling_rate.tolist() == [24_000 if use_nar else 16_000] * 2


def test_a_reference_is_the_voice_encoded_from_it(model, processor, tmp_path):
    texts = {"audio": CLIPS[0], "reference_text": "However little known the feelings may be."}
    direct = speak(model, processor("Hello there.", **texts))
    voice = model.encode_voice(**processor(**texts).to(model.device), metadata={"name": "me"})
    assert_same_speech(direct, speak(model, processor("Hello there."), voice=voice))

    voice.save(tmp_path / "me.safetensors")
    again = FlexiCodecVoice.load(tmp_path / "me.safetensors")
    assert again.metadata == {"name": "me"}
    assert sorted(again.tokens) == [0.86, 0.91, 1.0]
    assert_same_speech(direct, speak(model, processor("Hello there."), voice=again))
    assert_same_speech(direct, speak(model, processor("Hello there."), voice=str(tmp_path / "me.safetensors")))
    assert not torch.equal(direct.audio_codes, speak(model, processor("Hello there.")).audio_codes)
    # The text of the recording is read too.
    voice.text_ids = None
    assert not torch.equal(direct.audio_codes, speak(model, processor("Hello there."), voice=voice).audio_codes)


def test_each_item_can_bring_its_recording(model, processor):
    together = speak(model, processor(TEXTS, audio=CLIPS), use_nar=False)
    for item in range(2):
        alone = speak(model, processor(TEXTS[item], audio=CLIPS[item]), use_nar=False)
        assert_same_speech(alone, together, 0, item)
    one = speak(model, processor(TEXTS, audio=CLIPS[0]), use_nar=False)
    assert_same_speech(one, together)


def test_tokens_decode_later_as_at_once(model, processor):
    output = speak(model, processor(TEXTS), voice="ben", seed=[3, 4])
    later = model.decode_speech(
        output.audio_codes, output.token_lengths, output.audio_codes_mask, voice="ben", seed=[3, 4]
    )
    for item in range(2):
        assert_same_speech(output, later, item, item)
    # Two quantizers: the codec reads both, the Voicebox the semantic one.
    codes = output.audio_codes.repeat(1, 2, 1) % 16
    rich, plain = (model.decode_speech(c, output.token_lengths, use_nar=False) for c in (codes, codes[:, :1]))
    assert not torch.equal(rich.audio, plain.audio)
    assert rich.sampling_rate.tolist() == [16_000] * 2
    rich, plain = (model.decode_speech(c, output.token_lengths, seed=0) for c in (codes, codes[:, :1]))
    assert torch.equal(rich.audio, plain.audio)


def test_sources_of_chance(model, processor):
    inputs = processor(TEXTS)

    def codes(**kwargs):
        return speak(model, inputs, **({"seed": None, "use_nar": False} | kwargs)).audio_codes.tolist()

    assert codes(seed=7) == codes(seed=[7, 7]) != codes(seed=[7, 8])
    torch.manual_seed(0)
    first = codes()
    assert first != codes()
    torch.manual_seed(0)
    assert first == codes()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert codes(generator=generators) == codes(seed=7)
    one = codes(generator=torch.Generator().manual_seed(7))
    assert one[0] == codes(seed=7)[0] and one[1] != codes(seed=7)[1]


def test_several_takes_of_a_text(model, processor):
    output = speak(model, processor(TEXTS), num_return_sequences=2, voice=["anna", "ben"])
    assert len(output.audio) == 4
    assert not torch.equal(output.audio_codes[0], output.audio_codes[1])
    assert_same_speech(speak(model, processor(TEXTS[1]), voice="ben"), output, 0, 2)


def test_generation_config_is_heeded(model, processor):
    inputs = processor("Hello there.").to(model.device)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "merging_threshold": 0.86}
    config = GenerationConfig(**settings)
    chosen = speak(model, inputs, generation_config=config, use_nar=False)
    assert chosen.audio_codes.shape[2] == 5
    named = speak(model, inputs, **settings, use_nar=False)
    assert_same_speech(chosen, named)
    assert config.guidance_scale is None and not config.return_dict_in_generate
    assert torch.equal(model.generate(**inputs, seed=1), speak(model, inputs).audio)


class EndAtOnce(LogitsProcessor):
    """Lets the first row say nothing."""

    def __init__(self, end_token_id):
        self.end_token_id = end_token_id

    def __call__(self, input_ids, scores):
        end = scores[0, self.end_token_id].clone()
        scores[0] = -torch.inf
        scores[0, self.end_token_id] = end
        return scores


def test_an_item_may_say_nothing(model, processor):
    silence = {
        "logits_processor": LogitsProcessorList([EndAtOnce(model.config.ar_config.end_token_id)]),
        "min_new_tokens": 0,
    }
    output = speak(model, processor(TEXTS), **silence)
    assert output.padding_mask.sum(dim=1).tolist()[0] == 0 and output.token_lengths[0].sum() == 0
    assert_same_speech(output, speak(model, processor(TEXTS[1]), min_new_tokens=0), 1, 0)
    nothing = speak(model, processor(TEXTS[0]), **silence)
    assert nothing.audio.shape == (1, 1, 0) and nothing.sampling_rate.tolist() == [24_000]
    spoken = model.decode_speech(torch.ones(2, 1, 3).long(), torch.tensor([[0, 0, 0], [2, 0, 0]]), use_nar=False)
    assert spoken.padding_mask.sum(dim=1).tolist() == [0, 2544]


def test_a_model_without_second_stage(tts_parts, device, processor):
    model = FlexiCodecForTextToSpeech.from_parts_pretrained(tts_parts / "codec", tts_parts / "ar").to(device)
    assert model.config.sampling_rate == 16_000
    assert model.voicebox is None and model.vocoder is None
    output = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, return_dict_in_generate=True)
    assert output.sampling_rate.tolist() == [16_000]
    with pytest.raises(ValueError, match="has no Voicebox: pass `use_nar=False`"):
        model.decode_speech(output.audio_codes, output.token_lengths, use_nar=True)
    with pytest.raises(ValueError, match="no Voicebox, which gives speech the voice"):
        model.convert_voice(**source(processor))


def test_the_default_threshold_is_one_that_the_model_knows(tts_parts, device, processor):
    ids = torch.tensor([[3, 4, 5]])
    for known, default in (([0.5, 0.7, 0.6], 0.7), ([], 0.8)):
        codec = FlexiCodecModel.from_pretrained(tts_parts / "codec", merging_threshold=0.8)
        ar = FlexiCodecARForConditionalGeneration.from_pretrained(tts_parts / "ar")
        config = FlexiCodecARConfig(**ar.config.to_dict() | {"merging_thresholds": known})
        ar = FlexiCodecARForConditionalGeneration(config)
        model = FlexiCodecForTextToSpeech.from_parts_pretrained(codec, ar).to(device).eval()
        model.voices["anna"] = model.encode_voice(**processor(audio=CLIPS[0]))
        assert model.config.default_merging_threshold == model.generation_config.merging_threshold == default
        options = {"max_new_tokens": 4, "seed": 0, "voice": "anna"}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, merging_threshold=default))
    # Without a condition, the model may still speak like a voice at another rate.
    assert model.generate(ids, **options, merging_threshold=1.0).shape[2] > 0


def source(processor):
    return processor.feature_extractor(CLIPS[0]["array"], sampling_rate=16_000, return_tensors="pt")


def test_convert_voice_says_the_tokens_of_the_source(model, processor):
    inputs = source(processor).to(model.device)
    output = model.convert_voice(**inputs, voice="ben", seed=3)
    encoded = model.codec.encode(**inputs, num_quantizers=1, merging_threshold=0.91)
    assert torch.equal(output.audio_codes, encoded.audio_codes)
    spoken = model.decode_speech(encoded.audio_codes, encoded.token_lengths, voice="ben", seed=3)
    assert_same_speech(output, spoken)
    unmerged = model.convert_voice(**inputs, voice="ben", merging_threshold=1.0)
    assert unmerged.token_lengths.unique().tolist() == [1]


def test_long_speech_is_decoded_in_bounded_chunks(model, processor, monkeypatch):
    clips = [read_audio(AUDIO / "librivox_long.flac", 16_000).waveform[: 16_000 * seconds] for seconds in (7, 5)]
    inputs = processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt").to(model.device)
    frames = []
    sample = model.voicebox.sample
    monkeypatch.setattr(
        model.voicebox, "sample", lambda *args, **kwargs: frames.append(args[0].shape[1]) or sample(*args, **kwargs)
    )
    together = model.convert_voice(**inputs, voice=["anna", "ben"], seed=2, chunk_length_s=2)
    # Chunks of 25 frames with up to 25 on each side.
    assert frames == [50, 75, 62, 37]
    whole = model.convert_voice(**inputs, voice=["anna", "ben"], seed=2, chunk_length_s=None)
    assert together.audio.shape == whole.audio.shape
    assert torch.equal(together.padding_mask, whole.padding_mask)
    assert together.audio.isfinite().all()
    alone = processor.feature_extractor(clips[1], sampling_rate=16_000, return_tensors="pt").to(model.device)
    assert_same_speech(model.convert_voice(**alone, voice="ben", seed=2, chunk_length_s=2), together, 0, 1)
    with pytest.raises(ValueError, match=r"must be more than 0.16 seconds, got 0.1"):
        model.convert_voice(**alone, chunk_length_s=0.1)


@pytest.fixture(scope="module")
def latent_repository(tts_repository, processor, tmp_path_factory):
    """A repository whose Voicebox predicts latents of its codec, with a voice."""
    torch.manual_seed(0)
    parts = FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    codes = {"codebook_size": parts.config.codec_config.semantic_codebook_size, "repa_layer_index": None}
    config = FlexiCodecVoiceboxConfig(**sizes, **codes, **latent_config(parts.config.codec_config.hidden_size))
    voicebox = FlexiCodecVoiceboxModel(config)
    for parameter in voicebox.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = FlexiCodecForTextToSpeech.from_parts_pretrained(parts.codec, parts.ar, voicebox)
    model.generation_config = parts.generation_config
    processor = FlexiCodecTTSProcessor(processor.feature_extractor, processor.tokenizer)
    model.voices["anna"] = model.encode_voice(**processor(audio=CLIPS[0], reference_text="However little known."))
    folder = tmp_path_factory.mktemp("latent")
    save_repository(folder, model.codec, model, processor)
    return folder


@pytest.fixture(scope="module")
def latent_processor(latent_repository):
    return FlexiCodecTTSProcessor.from_pretrained(latent_repository)


@pytest.fixture
def latent_model(latent_repository, device):
    return AutoModelForTextToWaveform.from_pretrained(latent_repository).to(device)


def test_latents_are_decoded_by_the_codec(latent_model, latent_processor):
    model, processor = latent_model, latent_processor
    assert type(model) is FlexiCodecForTextToSpeech and model.vocoder is None
    reference = processor(audio=CLIPS[0]).to(model.device)
    assert not any("mel" in name for name in reference)
    voice = model.voices["anna"]
    inputs = source(processor).to(model.device)
    latents = model.codec.encode(**inputs, merging_threshold=1.0).latents[0].T
    assert_close(voice.mel, latents.cpu(), atol=1e-5)

    output = speak(model, processor(TEXTS[0]), seed=5, guidance_scale=1.5)
    codes, lengths = (tensor[None].to(model.device) for tensor in voice.tokens_at(0.91))
    numbers = torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(5)).tolist()
    sampled = model.voicebox.sample(
        output.audio_codes[:, 0],
        output.token_lengths,
        codes,
        lengths,
        latents[None],
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=[torch.Generator().manual_seed(numbers[1])],
    )
    decoded = model.codec.decode(latents=sampled.mel.transpose(1, 2), audio_codes_mask=sampled.mel_mask)
    assert_close(output.audio, decoded.audio_values.cpu(), atol=1e-5)
    assert output.sampling_rate.tolist() == [model.config.sampling_rate] == [16_000]
    semantic = speak(model, processor(TEXTS[0]), seed=5, use_nar=False)
    assert semantic.audio.shape == output.audio.shape and not torch.equal(semantic.audio, output.audio)


def test_latents_in_batches(latent_model, latent_processor):
    model, processor = latent_model, latent_processor
    said = "However little known the feelings may be."
    short = CLIPS[1] | {"array": CLIPS[1]["array"][:8_000]}
    together = speak(model, processor(TEXTS, audio=[CLIPS[0], short], reference_text=[said, "Good."]), seed=[3, 4])
    assert not together.audio[:, 0][~together.padding_mask].any()
    voice = model.encode_voice(**processor(audio=short, reference_text="Good.").to(model.device))
    assert_same_speech(speak(model, processor(TEXTS[1]), voice=voice, seed=4), together, 0, 1)
    later = model.decode_speech(
        *(together[name] for name in ("audio_codes", "token_lengths", "audio_codes_mask")),
        voice=[model.voices["anna"], voice],
        seed=[3, 4],
    )
    for item in range(2):
        assert_same_speech(together, later, item, item)


def test_latents_in_bounded_chunks(latent_model, latent_processor, monkeypatch):
    model = latent_model
    clips = [read_audio(AUDIO / "librivox_long.flac", 16_000).waveform[: 16_000 * seconds] for seconds in (7, 5)]
    inputs, alone = (
        latent_processor.feature_extractor(some, sampling_rate=16_000, return_tensors="pt").to(model.device)
        for some in (clips, clips[1:])
    )
    frames = []
    sample = model.voicebox.sample
    monkeypatch.setattr(
        model.voicebox, "sample", lambda *args, **kwargs: frames.append(args[0].shape[1]) or sample(*args, **kwargs)
    )
    together = model.convert_voice(**inputs, seed=2, chunk_length_s=2)
    assert frames == [50, 75, 62, 37]
    assert_same_speech(model.convert_voice(**alone, seed=2, chunk_length_s=2), together, 0, 1)
    whole = model.convert_voice(**inputs, seed=2, chunk_length_s=None)
    assert torch.equal(together.padding_mask, whole.padding_mask)
    for item in range(2):
        assert_same_speech(model.convert_voice(**inputs, seed=2), whole, item, item)


def test_chunks_of_latents_fade_into_each_other(latent_model, device, monkeypatch):
    windows, decoded = iter([0.0, 1.0]), []
    decode = latent_model.codec.decode

    def sample(codes, *args, **kwargs):
        size = latent_model.config.voicebox_config.num_mel_bins
        return FlexiCodecVoiceboxSampleOutput(mel=torch.full((*codes.shape, size), next(windows), device=device))

    monkeypatch.setattr(latent_model.voicebox, "sample", sample)
    monkeypatch.setattr(latent_model.codec, "decode", lambda **kwargs: decoded.append(kwargs) or decode(**kwargs))
    latent_model.decode_speech(torch.ones(1, 1, 30, device=device).long(), chunk_length_s=2.0)
    expected = torch.tensor([0.0] * 25 + fade_in(2).tolist() + [1.0] * 3)
    assert 0 < expected[25] < expected[26] < 1
    assert_close(decoded[0]["latents"][0].T, expected[:, None].expand(30, 32), atol=1e-6)


def test_a_system_of_latents_is_saved_whole(latent_model, latent_processor, tmp_path, device):
    latent_model.save_pretrained(tmp_path)
    again, info = FlexiCodecForTextToSpeech.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = latent_processor(TEXTS[0])
    assert_same_speech(speak(latent_model, inputs), speak(again.to(device), inputs))


def test_the_stock_pipeline_speaks_by_latents(latent_repository, latent_model, latent_processor, device):
    pipe = pipeline("text-to-speech", model=str(latent_repository), device=device)
    for text, inputs in (
        (TEXTS[0], latent_processor(TEXTS[0])),
        (chat(TEXTS[0], CLIPS[1], "Good."), latent_processor(TEXTS[0], audio=CLIPS[1], reference_text="Good.")),
    ):
        spoken = pipe(text, generate_kwargs={"seed": 1})
        assert spoken["sampling_rate"] == 16_000
        assert_close(torch.from_numpy(spoken["audio"]), speak(latent_model, inputs).audio[0, 0].cpu(), atol=1e-5)


def test_parts_of_other_kinds_do_not_fit(latent_model, latent_processor, model):
    with pytest.raises(ValueError, match="no `mel` of 32 channels, as the Voicebox makes them"):
        speak(latent_model, latent_processor(TEXTS[0]), voice=model.voices["ben"])
    with pytest.raises(Exception, match="`vocoder_config` must be left out"):
        FlexiCodecForTextToSpeech.from_parts_pretrained(
            latent_model.codec, latent_model.ar, latent_model.voicebox, model.vocoder
        )


def test_save_and_load_in_shards(model, processor, tmp_path, device):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, info = FlexiCodecForTextToSpeech.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert list(again.voices) == list(model.voices) == again.config.voices
    assert again.generation_config.num_inference_steps == 2
    assert_same_speech(speak(model, processor(TEXTS[0])), speak(again.to(device), processor(TEXTS[0])))
    assert "/" not in json.dumps({k: v for k, v in again.config.to_dict().items() if k == "codec_config"})


def latent_config(size):
    """Of a Voicebox that predicts latents of a codec."""
    statistics = {"latent_mean": [0.1] * size, "latent_std": [0.5] * size}
    return {"num_mel_bins": size, "upsample_factor": 1, **statistics}


def test_config_round_trip(model):
    config = FlexiCodecTTSConfig.from_dict(model.config.to_dict())
    assert config.to_dict() == model.config.to_dict()
    whole = FlexiCodecTTSConfig(voicebox_config={}, vocoder_config={})
    assert whole.sampling_rate == 24_000 and whole.ar_config.hidden_size == 1024
    latent = latent_config(512)
    assert FlexiCodecTTSConfig(voicebox_config=latent).sampling_rate == 16_000
    for wrong, message in (
        ({"voicebox_config": {}}, "`vocoder_config` is missing"),
        ({"vocoder_config": {}}, "`voicebox_config` is missing"),
        ({"ar_config": {"speech_vocab_size": 9}}, "`ar_config.speech_vocab_size` is 9, but the codec has 32768"),
        ({"voicebox_config": {"codebook_size": 9}, "vocoder_config": {}}, "`voicebox_config.codebook_size` is 9"),
        ({"voicebox_config": {}, "vocoder_config": {"num_mel_bins": 80}}, "of 128 bins, the vocoder reads 80"),
        ({"voicebox_config": {"upsample_factor": 2}, "vocoder_config": {}}, "25 mel frames a second, .* reads 50"),
        ({"voicebox_config": latent, "vocoder_config": {}}, "`vocoder_config` must be left out"),
        ({"voicebox_config": latent | {"upsample_factor": 4}}, r"`upsample_factor` \(512, 4\), .* decodes \(512, 1\)"),
        ({"voicebox_config": latent_config(256)}, r"`upsample_factor` \(256, 1\), .* decodes \(512, 1\)"),
    ):
        with pytest.raises(Exception, match=message):
            FlexiCodecTTSConfig(**wrong)


def test_dtypes(tts_repository, processor, device):
    load = FlexiCodecForTextToSpeech.from_pretrained
    half = load(tts_repository, subfolder="tts", dtype=torch.bfloat16).to(device)
    assert {part: getattr(half, part).dtype for part in ("codec", "ar", "voicebox", "vocoder")} == {
        "codec": torch.float32,
        "ar": torch.bfloat16,
        "voicebox": torch.bfloat16,
        "vocoder": torch.bfloat16,
    }
    assert half.dtype == torch.float32 and half.vocoder.head.linear.weight.dtype == torch.float32
    output = speak(half, processor(TEXTS, audio=CLIPS[0]))
    assert output.audio.dtype == torch.float32 and output.audio.isfinite().all()

    mixed = load(tts_repository, subfolder="tts", dtype={"ar": "bfloat16", "vocoder": torch.bfloat16})
    assert mixed.ar.dtype == mixed.vocoder.dtype == torch.bfloat16
    assert mixed.codec.dtype == mixed.voicebox.dtype == mixed.vocoder.head.linear.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"no part \['nar'\]"):
        load(tts_repository, subfolder="tts", dtype={"nar": torch.bfloat16})


def test_device_map(tts_repository, processor, device):
    model = FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts", device_map="auto")
    reference = FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts")
    assert_same_speech(speak(model, processor(TEXTS[0])), speak(reference, processor(TEXTS[0])))


def test_parts_can_lie_on_the_disk(tts_repository, processor, device, tmp_path):
    load = FlexiCodecForTextToSpeech.from_pretrained
    places = {"codec": device, "ar": "disk", "voicebox": "disk", "vocoder": "disk"}
    model = load(tts_repository, subfolder="tts", device_map=places, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in model.ar.parameters()} == {"meta"}
    reference = load(tts_repository, subfolder="tts").to(device)
    assert_same_speech(speak(model, processor(TEXTS)), speak(reference, processor(TEXTS)))


def test_a_part_stays_whole(tts_repository):
    places = {"codec": "cpu", "ar.model": "cpu", "ar.lm_head": "disk", "voicebox": "cpu", "vocoder": "cpu"}
    with pytest.raises(ValueError, match=r"puts parts of `ar` on \['cpu', 'disk'\]"):
        FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts", device_map=places)


def test_int8_weights_speak(tts_repository, processor, device):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["codec"])
    model = FlexiCodecForTextToSpeech.from_pretrained(
        tts_repository, subfolder="tts", quantization_config=config, device_map=device
    )
    kinds = {name: {type(p).__name__ for p in getattr(model, name).parameters()} for name in ("codec", "ar")}
    assert kinds["codec"] == {"Parameter"} and "Int8Tensor" in kinds["ar"]
    assert speak(model, processor(TEXTS[0])).audio.isfinite().all()
    assert model.get_input_embeddings() is model.ar.model.speech_embedding


def test_one_repository_for_codec_and_speech(tts_repository, tmp_path):
    shutil.copytree(tts_repository, tmp_path, dirs_exist_ok=True)
    speech = AutoModelForTextToWaveform.from_pretrained(tmp_path)
    assert type(speech) is FlexiCodecForTextToSpeech
    assert list(speech.voices) == ["anna", "ben"]
    for path, options in ((tmp_path, {"subfolder": "tts"}), (tmp_path / "tts", {})):
        for auto_class in (AutoModel, AutoModelForTextToWaveform):
            same = auto_class.from_pretrained(path, **options)
            assert type(same) is FlexiCodecForTextToSpeech
            assert list(same.voices) == ["anna", "ben"]
    # The codec needs nothing of the system, whose codec is another.
    codec = AutoModel.from_pretrained(tmp_path)
    assert codec.config.to_dict() != speech.codec.config.to_dict()
    assert {name: tensor.shape for name, tensor in codec.state_dict().items()} == {
        name: torch.Size(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    shutil.rmtree(tmp_path / "tts")
    assert type(AutoModel.from_pretrained(tmp_path)) is type(codec)
    for speaker_class in (AutoModelForTextToWaveform, FlexiCodecForTextToSpeech):
        with pytest.raises(OSError, match=r"cannot speak: it holds the codec alone, there is no tts/config.json"):
            speaker_class.from_pretrained(tmp_path)


def test_a_codec_in_both_roles_is_stored_once(latent_repository, latent_model, latent_processor, tmp_path, device):
    weights = load_file(latent_repository / "tts" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"ar", "voicebox"}
    assert json.loads((latent_repository / "tts" / "config.json").read_text())["shares_codec"] is True
    root = AutoModel.from_pretrained(latent_repository)
    shutil.copytree(latent_repository, tmp_path / "a" / "b")
    for path, options in (
        (latent_repository / "tts", {}),
        (latent_repository, {}),
        (latent_repository, {"subfolder": "tts"}),
        (tmp_path / "a", {"subfolder": "b"}),
        (tmp_path / "a", {"subfolder": "b/tts"}),
    ):
        model, info = FlexiCodecForTextToSpeech.from_pretrained(path, **options, output_loading_info=True)
        assert not any(info.values())
        for name, tensor in root.state_dict().items():
            assert torch.equal(model.codec.state_dict()[name], tensor)

    # Elsewhere the model holds its codec itself.
    assert not latent_model.config.shares_codec
    latent_model.save_pretrained(tmp_path / "alone")
    alone = FlexiCodecForTextToSpeech.from_pretrained(tmp_path / "alone").to(device)
    assert_same_speech(speak(alone, latent_processor(TEXTS[0])), speak(latent_model, latent_processor(TEXTS[0])))

    (tmp_path / "a" / "b" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        FlexiCodecForTextToSpeech.from_pretrained(tmp_path / "a", subfolder="b/tts")


def test_weights_can_be_stored_in_half_the_size(latent_model, latent_processor, tmp_path, device):
    save_repository(tmp_path, latent_model.codec, latent_model, latent_processor, storage_dtype=torch.float16)
    for file in (tmp_path / "model.safetensors", tmp_path / "tts" / "model.safetensors"):
        kinds = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert kinds == {torch.float16}
    model = AutoModelForTextToWaveform.from_pretrained(tmp_path).to(device)
    stored = {name: tensor.half().float() for name, tensor in latent_model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == latent_model.state_dict()[name].dtype
        assert torch.equal(tensor.float(), stored[name])
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32


def test_voices_that_are_missing_are_left_out(tts_repository, tmp_path, caplog, monkeypatch):
    shutil.copytree(tts_repository / "tts", tmp_path / "alone")
    monkeypatch.setattr(logging.getLogger("flexicodec_hf"), "propagate", True)
    model = FlexiCodecForTextToSpeech.from_pretrained(tmp_path / "alone")
    assert model.voices == {}
    for name in ("anna", "ben"):
        assert f"The voice '{name}' of {tmp_path / 'alone'} has no file in voices/: it is left out." in caplog.messages
    # The model invents a voice.
    assert model.generate(torch.tensor([[257, 72, 105]]), seed=0).shape[2] > 0


def test_voice_files(model, tmp_path):
    voice = model.voices["anna"]
    voice.save(tmp_path / "voice.safetensors")
    tensors = load_file(tmp_path / "voice.safetensors")
    assert {"mel", "text_ids", "audio_codes/0.91", "token_lengths/0.91"} < tensors.keys()
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (
        ("nobody.safetensors", "there is no such voice file"),
        ("text.safetensors", "is no safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            FlexiCodecVoice.load(tmp_path / name)


def test_a_file_of_weights_is_no_voice(tts_repository):
    with pytest.raises(ValueError, match="holds no voice"):
        FlexiCodecVoice.load(tts_repository / "model.safetensors")


def test_wrong_use_says_what_to_do(model, processor):
    inputs = processor(TEXTS).to(model.device)
    reference = processor(audio=CLIPS[0]).to(model.device)
    codes, lengths = torch.ones(2, 1, 3).long(), torch.ones(2, 3).long()
    unknown = FlexiCodecVoice(tokens={0.5: (torch.ones(1).long(), torch.ones(1).long())})
    no_mel = FlexiCodecVoice(tokens=model.voices["anna"].tokens)
    for call, message in (
        (lambda: model.generate(), "nothing to say: `input_ids` hold no text"),
        (lambda: model.generate(torch.zeros(1, 0).long()), "nothing to say"),
        (lambda: model.generate(torch.zeros(0, 3).long()), "nothing to say"),
        (lambda: model.generate(torch.ones(1, 3).long(), torch.zeros(1, 3)), "item 0 of `input_ids` holds no text"),
        (lambda: model.generate(**inputs, voice="cleo"), r"'cleo' is not known. This model has \['anna', 'ben'\]"),
        (lambda: model.generate(**inputs, voice=["anna"] * 3), "2 items to speak and 3 voices"),
        (lambda: model.generate(**inputs, voice="anna", **reference), "either `voice` or a reference recording"),
        (lambda: model.generate(**inputs, reference_mel=reference["reference_mel"]), "came without the recording"),
        (lambda: model.generate(**inputs, merging_threshold=0.5), r"trained with \[0.86, 0.91\]"),
        (lambda: model.generate(**inputs, voice=unknown), r"no tokens at `merging_threshold`=0.91, only at \[0.5\]"),
        (lambda: model.generate(**inputs, voice=no_mel), "no `mel` of 128 channels, as the Voicebox makes them"),
        (lambda: model.generate(**inputs, seed=1, generator=torch.Generator()), "either `seed` or `generator`"),
        (lambda: model.generate(**inputs, seed=[1, 2, 3]), "`seed` is a list of 3 for 2 items"),
        (lambda: model.generate(**inputs, generator=[torch.Generator()]), "`generator` is a list of 1 for 2 items"),
        (lambda: model.generate(**inputs, temprature=1.0), "temprature"),
        (
            lambda: model.generate(**(inputs | {"continuation_ids": torch.ones(1, 3).long()})),
            "`continuation_ids` holds 1 texts and `input_ids` 2",
        ),
        (lambda: model.decode_speech(codes[:, 0], lengths), r"Semantic codes alone are `codes\[:, None\]`"),
        (lambda: model.decode_speech(codes, lengths[:, :2]), "`token_lengths` must have the shape .* = \\(2, 3\\)"),
        (lambda: model.encode_voice(**processor(audio=CLIPS)), "A voice is one recording, got 2"),
        (
            lambda: model.encode_voice(reference["reference_input_values"], reference["reference_input_features"]),
            "`reference_mel` is missing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"audio_codes": None}, "needs `audio_codes`"),
        ({"audio_codes": torch.ones(2, 1, 3)}, "`audio_codes` must be integers, got torch.float32"),
        ({"audio_codes": torch.ones(2, 1, 3).bool()}, "`audio_codes` must be integers, got torch.bool"),
        ({"audio_codes": torch.full((2, 1, 3), -1)}, "must be between 0 and .* in the semantic codebook, .* from -1"),
        ({"audio_codes": torch.full((2, 1, 3), 10**6)}, "must be between 0 and .* to 1000000"),
        ({"audio_codes": torch.tensor([[[1] * 3, [4096] * 3]] * 2)}, "in an acoustic codebook, got values from 4096"),
        ({"audio_codes": torch.ones(2, 99, 3).long()}, "codebooks .*, got 99"),
        ({"audio_codes": torch.ones(2, 1, 0).long(), "token_lengths": torch.ones(2, 0).long()}, "nothing to decode"),
        ({"token_lengths": torch.ones(2, 3)}, "`token_lengths` must be integers, got torch.float32"),
        ({"token_lengths": torch.full((2, 3), -1)}, "`token_lengths` must be 0 to 9, got values from -1"),
        ({"token_lengths": torch.full((2, 3), 10)}, "`token_lengths` must be 0 to 9, got values from 10"),
        ({"audio_codes_mask": torch.ones(2, 2)}, "`audio_codes_mask` must have the shape"),
        ({"audio_codes_mask": torch.tensor([[1, 0, 1]] * 2)}, "padding goes on the right"),
    ],
)
def test_speech_of_impossible_tokens_is_refused(model, changes, message):
    tokens = {"audio_codes": torch.ones(2, 1, 3).long(), "token_lengths": torch.ones(2, 3).long()} | changes
    with pytest.raises(ValueError, match=message):
        model.decode_speech(**tokens)


def test_unknown_settings_are_refused(model):
    codes = torch.ones(1, 1, 3).long()
    with pytest.raises(TypeError, match=r"Unexpected arguments \['temperature'\]: the settings are \['num_inference"):
        model.decode_speech(codes, temperature=0.5)
    assert model.decode_speech(codes, num_inference_steps=None, seed=None).audio.shape == (1, 1, 3 * 1920)


def test_a_call_overrides_the_generation_config(model):
    codes, steps = torch.ones(1, 1, 3).long(), []
    sample = model.voicebox.sample
    model.voicebox.sample = lambda *args, **kwargs: (
        steps.append(kwargs["num_inference_steps"]) or sample(*args, **kwargs)
    )
    before = model.generation_config
    try:
        model.decode_speech(codes)
        model.decode_speech(codes, num_inference_steps=3)
        model.generation_config = GenerationConfig()
        model.decode_speech(codes)
    finally:
        model.generation_config = before
        del model.voicebox.sample
    assert steps == [2, 3, 15]


def test_parts_keep_their_weights(tts_parts):
    ar = FlexiCodecARForConditionalGeneration.from_pretrained(tts_parts / "ar")
    rows = torch.ones(300, ar.config.text_encoder_config.hidden_size)
    ar.model.text_encoder.embed_tokens = torch.nn.Embedding.from_pretrained(rows)
    model = FlexiCodecForTextToSpeech.from_parts_pretrained(tts_parts / "codec", ar)
    assert (model.ar.model.text_encoder.embed_tokens.weight == 1).all()


def test_a_voice_cannot_be_saved_elsewhere(model, tmp_path):
    voices = dict(model.voices)
    model.voices["../a"] = next(iter(voices.values()))
    try:
        with pytest.raises(ValueError, match="name of a voice"):
            model.save_pretrained(tmp_path / "saved")
    finally:
        model.voices = voices
    assert not list(tmp_path.iterdir())


def chat(text, clip=None, said=None):
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    if clip is not None:
        items = [{"type": "audio", "audio": clip["array"]}]
        if said:
            items.append({"type": "text", "text": said})
        messages.insert(0, {"role": "voice", "content": items})
    return messages


def test_the_stock_pipeline_speaks(tts_repository, model, processor, device):
    pipe = pipeline("text-to-speech", model=str(tts_repository), device=device)
    assert type(pipe.model) is FlexiCodecForTextToSpeech and type(pipe.processor) is FlexiCodecTTSProcessor
    expected = speak(model, processor(TEXTS))

    def same(spoken, item=0, output=expected):
        assert spoken["sampling_rate"] == 24_000
        assert_close(torch.from_numpy(spoken["audio"]), waveform(output, item), atol=1e-5)

    same(pipe(TEXTS[0], generate_kwargs={"seed": 1}))
    torch.manual_seed(0)
    first = pipe(TEXTS[0])["audio"]
    torch.manual_seed(0)
    assert_close(torch.from_numpy(first), model.generate(**processor(TEXTS[0]).to(device))[0, 0].cpu(), atol=1e-5)
    for item, spoken in enumerate(pipe(TEXTS, generate_kwargs={"seed": 1})):
        same(spoken, item)
    # In a batch the stock pipeline leaves the padding on.
    for item, spoken in enumerate(pipe(TEXTS, batch_size=2, generate_kwargs={"seed": 1})):
        assert_close(torch.from_numpy(spoken["audio"]), expected.audio[item, 0].cpu(), atol=1e-5)

    options = {"voice": "ben", "do_sample": False, "seed": 1}
    same(pipe(TEXTS[0], generate_kwargs=options), output=speak(model, processor(TEXTS[0]), **options))
    said = "However little known."
    cloned = speak(model, processor(TEXTS[0], audio=CLIPS[0], reference_text=said))
    same(pipe(chat(TEXTS[0], CLIPS[0], said), generate_kwargs={"seed": 1}), output=cloned)
    for spoken in pipe([chat(TEXTS[0], CLIPS[0], said)] * 2, generate_kwargs={"seed": 1}):
        same(spoken, output=cloned)
    french = speak(model, processor(TEXTS[0], language="fr"))
    same(pipe(TEXTS[0], preprocess_params={"language": "fr"}, generate_kwargs={"seed": 1}), output=french)
    with pytest.raises(ValueError, match="must hold something to speak"):
        pipe("...")


def test_the_stock_pipeline_keeps_references_exact_in_bfloat16(tts_repository, processor, device):
    pipe = pipeline("text-to-speech", model=str(tts_repository), dtype=torch.bfloat16, device=device)
    seen = []
    encode = pipe.model.codec.encode
    pipe.model.codec.encode = lambda *args, **kwargs: seen.append(kwargs) or encode(*args, **kwargs)
    assert pipe.model.ar.dtype == torch.bfloat16
    pipe(chat(TEXTS[0], CLIPS[0]))
    exact = processor(audio=CLIPS[0])
    assert torch.equal(seen[0]["input_values"][:, 0].cpu(), exact["reference_input_values"])
    assert torch.equal(seen[0]["input_features"].cpu(), exact["reference_input_features"])
