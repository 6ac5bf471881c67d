"""
FlexiCodec in place of Mimi in moshi-finetune, which is not on PyPI: the interface was checked by reading
`finetune/data/interleaver.py` and `train.py` in copies of its repository, and with the package moshi 0.2.13.

In `train.py`, in place of `mimi = checkpoint_info.get_mimi(device="cuda")`:

    mimi = FlexiCodecAsMimi("flexicodec", num_codebooks=8).cuda()

The rest of the program takes the rates and the codes from it: `Interleaver(spm, mimi.frame_rate, ...)`,
`InterleavedTokenizer(mimi, interleaver, duration_sec)`. The frame rate is Mimi's, 12.5 Hz, without merging. The sizes
of the vocabularies are not: set the language model's `card` to `cardinality`, 32,768.
"""

import torch

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel


class FlexiCodecAsMimi(torch.nn.Module):
    channels = 1

    def __init__(self, source, num_codebooks=8):
        super().__init__()
        self.model = FlexiCodecModel.from_pretrained(source).eval()
        self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(source)
        config = self.model.config
        self.num_codebooks, self.total_codebooks = num_codebooks, config.num_quantizers
        self.sample_rate, self.frame_rate = config.sampling_rate, config.frame_rate
        self.frame_size = int(config.sampling_rate / config.frame_rate)
        self.cardinality = max(config.semantic_codebook_size, config.codebook_size)

    def set_num_codebooks(self, n):
        self.num_codebooks = n

    @torch.no_grad()
    def encode(self, x):
        """Waveforms `(batch_size, 1, num_samples)` to codes `(batch_size, num_codebooks, num_frames)`."""
        features = self.feature_extractor(
            list(x[:, 0].cpu()), sampling_rate=self.sample_rate, return_tensors="pt", device=self.model.device
        )
        return self.model.encode(**features, num_quantizers=self.num_codebooks, merging_threshold=1.0).audio_codes

    @torch.no_grad()
    def decode(self, codes):
        """Codes `(batch_size, num_codebooks, num_frames)` to waveforms `(batch_size, 1, num_samples)`."""
        return self.model.decode(codes).audio_values
