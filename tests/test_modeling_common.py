"""What transformers asks of every model, for each of ours (tests/model_testers.py)."""

import copy
import inspect

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, TorchAoConfig

from flexicodec_hf import (
    FlexiCodecARConfig,
    FlexiCodecConfig,
    FlexiCodecModel,
    FlexiCodecVocoderConfig,
    FlexiCodecVocoderModel,
    FlexiCodecVoiceboxConfig,
)
from model_testers import TESTERS


@pytest.fixture(params=TESTERS, ids=lambda tester: tester.model_class.__name__)
def tester(request):
    return request.param()


@pytest.fixture
def inputs(tester, device):
    return {name: tensor.to(device) for name, tensor in tester.prepare_config_and_inputs()[1].items()}


def main_output(tester, model, inputs):
    with torch.no_grad():
        return model(**inputs)[tester.output_name]


def test_a_config_survives_a_round_trip(tester, tmp_path):
    config = tester.get_config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, tester.config_class)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_saved_model_gives_the_same(tester, inputs, device, tmp_path):
    model = tester.create_model().to(device)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded, info = tester.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(main_output(tester, loaded.to(device), inputs), main_output(tester, model, inputs))


def test_the_base_model_loads_by_its_auto_class(tester, tmp_path):
    model = tester.create_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    base = getattr(model, model.base_model_prefix, model)
    assert isinstance(loaded, type(base))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name


def test_nothing_is_left_uninitialized(tester):
    """Models are built on the meta device: every tensor has to be filled."""
    with torch.device("meta"):
        model = tester.model_class(tester.get_config())
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    expected = dict(tester.create_model().named_buffers())
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all(), name
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, expected[name]), name


def test_a_forward_pass_is_repeatable(tester, inputs, device):
    model = tester.create_model().to(device)
    assert torch.equal(main_output(tester, model, inputs), main_output(tester, model, inputs))


def test_outputs_are_tuples_where_asked(tester, inputs, device):
    model = tester.create_model().to(device)
    output = model(**inputs)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output.to_tuple())
    for one, other in zip(as_tuple, output.to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


def test_eager_attention_equals_sdpa(tester, inputs, device):
    if not tester.supports_eager:
        pytest.skip("this model has no attention")
    sdpa, eager = (tester.create_model(attn_implementation=name).to(device) for name in ("sdpa", "eager"))
    assert sdpa.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    torch.testing.assert_close(
        main_output(tester, eager, inputs), main_output(tester, sdpa, inputs), atol=1e-5, rtol=1e-4
    )


def test_training_reaches_every_parameter_that_is_not_frozen(tester, inputs, device):
    model = tester.create_model().to(device).train()
    tester.train_loss(model, inputs).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


def test_gradient_checkpointing_changes_no_gradient(tester, inputs, device):
    gradients = []
    for checkpointing in (False, True):
        model = tester.create_model().to(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)  # dropout, and what training draws
        tester.train_loss(model, inputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_values(tester, inputs, device, dtype):
    model = tester.create_model().to(device, dtype)
    assert main_output(tester, model, inputs).isfinite().all()


def test_hooks_see_every_module_that_is_used_in_training(tester, inputs, device):
    """Hooks, quantization and wrappers work on modules: no kernel may go round them without gradients."""
    model = tester.create_model().to(device)
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    seen = {}
    for gradients in (True, False):
        called.clear()
        with torch.set_grad_enabled(gradients):
            model(**inputs)
        seen[gradients] = set(called)
    assert seen[True] == seen[False] and len(seen[True]) > 10


def test_weights_on_the_disk_give_the_same(tester, inputs, device, tmp_path):
    """Offloaded weights come when a module is called: none may be read without calling its module."""
    model = tester.create_model().to(device)
    model.save_pretrained(tmp_path / "model")
    first, *others = [name for name, _ in model.named_children() if name != "frame_merger"]
    places = {first: device} | dict.fromkeys(others, "disk")
    loaded = tester.model_class.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {device, "meta"}
    assert torch.equal(main_output(tester, loaded, inputs), main_output(tester, model, inputs))


def test_weights_in_int8_stay_near(tester, inputs, device, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = tester.create_model().to(device)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = tester.model_class.from_pretrained(tmp_path, quantization_config=config, device_map=device)
    quantized = [parameter for parameter in loaded.parameters() if "Int8" in type(parameter).__name__]
    assert len(quantized) > 4
    output, expected = main_output(tester, loaded, inputs), main_output(tester, model, inputs)
    assert (output - expected).norm() < 0.05 * expected.norm()


def test_adapters_alone_are_trained_and_saved(tester, inputs, device, tmp_path):
    peft = pytest.importorskip("peft")
    model = tester.create_model().to(device)
    expected = main_output(tester, model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=tester.lora_modules, r=2))
    assert torch.equal(main_output(tester, model, inputs), expected)  # adapters start at zero
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tester.train_loss(model, inputs).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all(".lora_" in name for name in trained)
    optimizer.step()
    changed = main_output(tester, model.eval(), inputs)
    assert not torch.equal(changed, expected)
    adapted.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    other = tester.create_model().to(device)
    peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(main_output(tester, other, inputs), changed)


def test_what_programs_pass_to_any_model_is_taken_and_nothing_else(tester, inputs, device):
    model = tester.create_model().to(device)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=False, output_attentions=False)
    assert torch.equal(output[tester.output_name], main_output(tester, model, inputs))
    assert isinstance(model.get_input_embeddings(), (nn.Embedding, nn.Conv1d))
    # `Trainer` averages over accumulation steps, as the losses are means.
    assert model.accepts_loss_kwargs is False
    if tester.model_class in (FlexiCodecModel, FlexiCodecVocoderModel):
        with pytest.raises(TypeError, match="unexpected arguments: merging_treshold"):
            model(**inputs, merging_treshold=0.9)


def test_a_copy_is_independent(tester, inputs, device):
    model = tester.create_model().to(device)
    expected = main_output(tester, model, inputs)
    for parameter in copy.deepcopy(model).parameters():
        parameter.data.zero_()
    assert torch.equal(main_output(tester, model, inputs), expected)


def test_forward_names_its_inputs_as_the_config_says(tester):
    names = list(inspect.signature(tester.model_class.forward).parameters)
    assert tester.model_class.main_input_name == names[1]


@pytest.mark.parametrize("number", [0, -1, 1_000_000])
@pytest.mark.parametrize(
    ("config_class", "field"),
    [
        (FlexiCodecConfig, "num_bottleneck_layers"),
        (FlexiCodecConfig, "num_aggregator_layers"),
        (FlexiCodecConfig, "num_convnext_layers"),
        (FlexiCodecARConfig, "num_hidden_layers"),
        (FlexiCodecVoiceboxConfig, "num_hidden_layers"),
        (FlexiCodecVocoderConfig, "num_hidden_layers"),
    ],
)
def test_numbers_of_layers_that_no_model_has_are_refused(config_class, field, number):
    with pytest.raises(StrictDataclassError, match=rf"{field}(.|\n)*1000"):
        config_class(**{field: number})
