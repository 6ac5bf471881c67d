"""
FlexiCodec as the audio encoder in the encoding step of parler-tts's training script.

parler-tts 0.2.3 requires transformers 4.46.1 and cannot be installed beside this package, so the step
(`training/run_parler_tts_training.py`, `apply_audio_decoder`) was checked with the collator of its source,
`training/data.py`. Run the step on its own, in an environment with this package:

    from parler_tts_codec import FlexiCodecForParlerTTS

    audio_decoder = FlexiCodecForParlerTTS.from_pretrained("flexicodec")
    feature_extractor = AutoFeatureExtractor.from_pretrained("flexicodec")
    collator = DataCollatorEncodecWithPadding(feature_extractor, audio_column_name="audio")
    labels = audio_decoder.encode(**batch, bandwidth=None)["audio_codes"]

and give the labels to the script with `--save_to_disk`. Nothing is merged: 12.5 tokens per second. parler-tts has one
vocabulary for all codebooks, which must hold the 32,768 entries of the first.
"""

from flexicodec_hf import FlexiCodecModel


class FlexiCodecForParlerTTS(FlexiCodecModel):
    def encode(self, *args, bandwidth=None, **kwargs):
        """`{"audio_codes": (1, batch_size, num_quantizers, num_frames)}`; only Encodec uses `bandwidth`."""
        encoded = super().encode(*args, **kwargs, merging_threshold=1.0)
        return {"audio_codes": encoded.audio_codes[None]}
