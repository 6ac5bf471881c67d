"""A small configuration and inputs for each model, in the manner of transformers' `ModelTester` classes."""

from typing import Any

import torch
from torch import Tensor, nn

from flexicodec_hf import (
    FlexiCodecARConfig,
    FlexiCodecARForConditionalGeneration,
    FlexiCodecConfig,
    FlexiCodecModel,
    FlexiCodecVocoderConfig,
    FlexiCodecVocoderModel,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
)


def random_ids(shape: tuple[int, ...], high: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def random_floats(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


class ModelTester:
    """
    What tests/test_modeling_common.py needs of a model.

    Attributes:
        config_class, model_class: Of the model.
        output_name: The main output of `forward`.
        lora_modules: What the documentation says to adapt.
        supports_eager: Whether the model has more than one attention implementation.
    """

    config_class: type
    model_class: type
    output_name: str
    lora_modules: list[str]
    supports_eager = True

    def get_config(self) -> Any:
        raise NotImplementedError

    def prepare_config_and_inputs(self) -> tuple[Any, dict[str, Tensor]]:
        """A configuration, and a batch of two items of different lengths for `forward` in `eval` mode."""
        raise NotImplementedError

    def train_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """A loss whose gradient reaches everything that is trained."""
        raise NotImplementedError

    def create_model(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.model_class._from_config(self.get_config(), **kwargs).eval()


class FlexiCodecModelTester(ModelTester):
    config_class, model_class = FlexiCodecConfig, FlexiCodecModel
    output_name = "audio_values"
    lora_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

    def get_config(self) -> FlexiCodecConfig:
        return FlexiCodecConfig(
            semantic_model_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32},
            hidden_size=32,
            encoder_hidden_size=2,
            decoder_hidden_size=32,
            num_aggregator_layers=1,
            num_bottleneck_layers=1,
            aggregator_hidden_size=32,
            aggregator_intermediate_size=64,
            bottleneck_hidden_size=32,
            bottleneck_intermediate_size=64,
            convnext_hidden_size=8,
            convnext_intermediate_size=16,
            num_convnext_layers=1,
            num_quantizers=4,
            codebook_size=16,
        )

    def prepare_config_and_inputs(self) -> tuple[FlexiCodecConfig, dict[str, Tensor]]:
        inputs = {
            "input_values": random_floats((2, 1, 16_000)) / 10,
            "input_features": random_floats((2, 16, 560)),
            "padding_mask": mask([16_000, 11_200]),
            "input_features_mask": mask([16, 11]),
        }
        return self.get_config(), inputs

    def train_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        output = model(**inputs, num_quantizers=4, merging_threshold=0.9)
        return output.loss + output.audio_values.square().mean()


class FlexiCodecARModelTester(ModelTester):
    config_class, model_class = FlexiCodecARConfig, FlexiCodecARForConditionalGeneration
    output_name = "logits"
    lora_modules = ["qkv_proj", "o_proj", "fc1", "fc2"]

    def get_config(self) -> FlexiCodecARConfig:
        heads = {"num_attention_heads": 4}
        text_encoder = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
        return FlexiCodecARConfig(
            text_encoder_config=text_encoder | heads,
            speech_vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            **heads,
        )

    def prepare_config_and_inputs(self) -> tuple[FlexiCodecARConfig, dict[str, Tensor]]:
        model = FlexiCodecARForConditionalGeneration(self.get_config())
        text, speech = mask([7, 4]), mask([6, 3])
        inputs = model.build_inputs(
            random_ids(text.shape, 40),
            text,
            random_ids(speech.shape, 50),
            random_ids(speech.shape, 8, 1),
            speech,
            0.91,
        )
        return self.get_config(), inputs

    def train_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        is_speech = inputs["input_ids"] < model.config.speech_vocab_size
        labels = inputs["input_ids"].masked_fill(~is_speech, -100)
        return model(
            **inputs, labels=labels, duration_labels=inputs["token_lengths"].masked_fill(~is_speech, -100)
        ).loss


class FlexiCodecVoiceboxModelTester(ModelTester):
    config_class, model_class = FlexiCodecVoiceboxConfig, FlexiCodecVoiceboxModel
    output_name = "velocity"
    lora_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def get_config(self) -> FlexiCodecVoiceboxConfig:
        return FlexiCodecVoiceboxConfig(
            codebook_size=50,
            num_mel_bins=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            repa_layer_index=0,
            repa_hidden_size=24,
            semantic_hidden_size=12,
        )

    def prepare_config_and_inputs(self) -> tuple[FlexiCodecVoiceboxConfig, dict[str, Tensor]]:
        inputs = {
            "audio_codes": random_ids((2, 6), 50),
            "token_lengths": torch.tensor([[1, 2, 1, 1, 2, 1], [2, 1, 1, 0, 0, 0]]),
            "noisy_mel": random_floats((2, 32, 16)),
            "timesteps": torch.tensor([0.3, 0.8]),
            "mel_mask": mask([32, 16]),
        }
        return self.get_config(), inputs

    def train_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        inputs = dict(inputs)
        labels, features = inputs.pop("noisy_mel"), random_floats((2, 8, 12)).to(model.device)
        prompt_lengths = torch.tensor([5, 4], device=model.device)
        noise = random_floats((2, 32, 16)).to(model.device)
        return model(
            **inputs, labels=labels, noise=noise, prompt_lengths=prompt_lengths, semantic_features=features
        ).loss


class FlexiCodecVocoderModelTester(ModelTester):
    config_class, model_class = FlexiCodecVocoderConfig, FlexiCodecVocoderModel
    output_name = "audio_values"
    lora_modules = ["up_proj", "down_proj"]
    supports_eager = False

    def get_config(self) -> FlexiCodecVocoderConfig:
        return FlexiCodecVocoderConfig(
            num_mel_bins=16, hidden_size=24, intermediate_size=48, num_hidden_layers=2, n_fft=64, hop_length=16
        )

    def prepare_config_and_inputs(self) -> tuple[FlexiCodecVocoderConfig, dict[str, Tensor]]:
        return self.get_config(), {"mel": random_floats((2, 20, 16)), "mel_mask": mask([20, 13])}

    def train_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).audio_values.square().mean()


TESTERS = (FlexiCodecModelTester, FlexiCodecARModelTester, FlexiCodecVoiceboxModelTester, FlexiCodecVocoderModelTester)
