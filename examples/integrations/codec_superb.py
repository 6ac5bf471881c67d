"""
FlexiCodec in Codec-SUPERB (checked with its package, SoundCodec 1.6, and by reading its repository of 2025).

Copy this file to `SoundCodec/codec/flexicodec.py`, or import `Codec` from it: `load_codec("flexicodec")` and the
benchmark's scripts then know it. Token lengths travel in `stuff_for_synth`, so any rate works.
"""

import torch
from SoundCodec.base_codec.general import BaseCodec, ExtractedUnit

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel


class Codec(BaseCodec):
    source = "jiaqili3/flexicodec"
    rate = {"merging_threshold": 0.91}  # or {"target_frame_rate": 6.25}
    num_quantizers = 8

    def config(self):
        self.model = FlexiCodecModel.from_pretrained(self.source).to(self.device).eval()
        self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(self.source)
        self.sampling_rate = self.feature_extractor.sampling_rate
        self.setting = "flexicodec_" + "_".join(f"{name}_{value}" for name, value in self.rate.items())

    @torch.no_grad()
    def extract_unit(self, data):
        inputs = self.feature_extractor(
            data["audio"]["array"], sampling_rate=self.sampling_rate, return_tensors="pt", device=self.device
        )
        encoded = self.model.encode(**inputs, **self.rate, num_quantizers=self.num_quantizers)
        return ExtractedUnit(encoded.audio_codes[0], (encoded.audio_codes, encoded.token_lengths))

    @torch.no_grad()
    def decode_unit(self, stuff_for_synth):
        audio_codes, token_lengths = stuff_for_synth
        return self.model.decode(audio_codes, token_lengths=token_lengths).audio_values[0].cpu()  # (1, num_samples)
