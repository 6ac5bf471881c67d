"""
FlexiCodec with the interface of speechbrain's codecs (`Mimi`, `Encodec`, `DAC`; checked with speechbrain 1.1.2).

In a recipe, put this file beside the YAML file, which then says:

    codec: !new:speechbrain_codec.FlexiCodec
        source: flexicodec  # a converted repository
        save_path: !ref <save_folder>
        num_codebooks: 8

The interface has no token lengths, so nothing is merged: 12.5 tokens per second. Codebook 0 has 32,768 entries, the
others 4,096.
"""

from itertools import pairwise

import torch
from speechbrain.dataio.dataio import clean_padding_
from speechbrain.integrations.huggingface.mimi import Mimi

from flexicodec_hf import FlexiCodecFeatureExtractor


class FlexiCodec(Mimi):
    """The tensors are those of `Mimi`; the embeddings of a token add up to its latent vector."""

    def __init__(self, source, save_path="", sample_rate=16_000, freeze=True, num_codebooks=8):
        super().__init__(source, save_path, sample_rate, freeze, num_codebooks)
        self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(source)

    @torch.no_grad()
    def encode(self, inputs, length):
        inputs = inputs.reshape(len(inputs), -1)
        num_samples = (length * inputs.shape[1]).round().long().tolist()
        clips = [clip[:n].cpu() for clip, n in zip(inputs, num_samples, strict=True)]
        features = self.feature_extractor(
            clips, sampling_rate=self.sample_rate, return_tensors="pt", device=inputs.device
        )
        tokens = self.model.encode(**features, num_quantizers=self.num_codebooks, merging_threshold=1.0).audio_codes
        acoustic = self.model.acoustic_quantizer
        sums = [acoustic.from_codes(tokens[:, 1 : i + 1]) for i in range(1, tokens.shape[1])]
        semantic = self.model.get_semantic_features(tokens).transpose(1, 2)
        parts = [semantic, *sums[:1], *(b - a for a, b in pairwise(sums))]
        return tokens, torch.stack(parts, dim=1)

    @torch.no_grad()
    def decode(self, tokens, length=None):
        audio = self.model.decode(tokens).audio_values
        if length is not None:
            clean_padding_(audio, length, len_dim=2)
        return audio
