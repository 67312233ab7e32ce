"""What stops linearize, wherever it does, leaves the model as it was, to the byte; what looks at a model, no trace."""

import importlib

import pytest
import torch

from liger_layers import SoftmaxKernel
from liger_models import _calibration, _conversion, linearize, select_layers, selection
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

# Its rotary frequencies change with the length of what passes through.
_FACTORS = dict(short_factor=[1.0] * 6, long_factor=[1.5, 2.0, 2.5, 3.0, 3.5, 4.0], factor=2.0)
STRETCHED = dict(
    rope_parameters=dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32, **_FACTORS)
)
_linearize = importlib.import_module("liger_models.linearize")


def lived_in(name="llama", **options):
    """A model that is partly in training, partly frozen, and that somebody listens to."""
    model = tiny(name, **options).train()
    model.model.layers[1].eval()
    model.model.layers[2].self_attn.o_proj.eval()
    model.model.layers[0].mlp.requires_grad_(False)
    model.generation_config.temperature = 0.7
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: None)
    return model


def fingerprint(model):
    """Everything that could have changed: objects by identity, tensors by place and bytes, configs by content."""

    def told(value):
        return {key: id(x) for key, x in value.items()} if isinstance(value, dict) else id(value)

    found = {"random": torch.get_rng_state().numpy().tobytes()}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = type(module), module.training, {key: told(value) for key, value in vars(module).items()}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}, a tensor"] = id(x), x.data_ptr(), x.requires_grad, x.dtype, x.detach().numpy().tobytes()
    for name in ("config", "generation_config"):
        inside = getattr(model, name, None)
        found[f"{name}, inside"] = inside if inside is None or isinstance(inside, dict) else inside.to_dict()
    return found


def broken(function, error, calls=1, after=False):
    """The function, which fails when it is called for the calls-th time, before or after it has worked."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls and not after:
            raise error
        result = function(*args, **kwargs)
        if count == calls:
            raise error
        return result

    return call


STAGES = {
    "drawing": (_conversion, "draw_text", 1),
    "drawing, half way": (torch, "multinomial", 5),
    "measuring": (_calibration, "project", 2),
    "building the first": (_conversion, "build", 1),
    "building the last": (_conversion, "build", 3),
    "calibrating the first": (SoftmaxKernel, "calibrate", 1),
    "calibrating the last": (SoftmaxKernel, "calibrate", 3),
    "the config": (_linearize, "linearized_config", 1),
    "swapping": (_linearize, "swap_attention", 1),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_changes_nothing(monkeypatch, stage, after):
    (owner, name, calls), error = STAGES[stage], KeyboardInterrupt() if after else RuntimeError("out of memory")
    model = lived_in(**STRETCHED)
    before = fingerprint(model)
    monkeypatch.setattr(owner, name, broken(getattr(owner, name), error, calls, after))
    with pytest.raises(type(error)):
        (linearize if stage.startswith("drawing") else linearize_tiny)(model, window=8, memories=2)
    assert fingerprint(model) == before


@pytest.mark.parametrize("calls", [1, 2])
def test_a_hook_that_fails_changes_nothing(calls):
    model = lived_in("phi3")
    model.model.layers[1].register_forward_hook(broken(lambda *args: None, ValueError("mine"), calls))
    calibration = ids(16, 256)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="mine"):
        linearize(model, calibration=calibration, window=8)
    assert fingerprint(model) == before


def test_success_changes_what_it_has_to():
    model = lived_in(**STRETCHED)
    old = [layer.self_attn for layer in model.model.layers]
    before, apart = fingerprint(model), [{**vars(x), "_modules": dict(x._modules)} for x in old]
    settings = model.generation_config
    linearize_tiny(model, window=8, keep=[0])
    after = fingerprint(model)
    assert before["random"] == after["random"] and model.generation_config is settings
    for name in before:
        if name.endswith(", a tensor"):
            assert before[name] == after[name], name
        elif name.startswith("model.") and name not in ("model.layers.1.self_attn", "model.layers.2.self_attn"):
            assert before[name][:2] == after[name][:2], name
    # Those that others hold on to are still whole, but for the config of the layer that stays.
    for attention, held in zip(old[1:], apart[1:], strict=True):
        assert {**vars(attention), "_modules": dict(attention._modules)} == held
    assert model.model.layers[0].self_attn is old[0]
    for index in (1, 2):
        new = model.model.layers[index].self_attn
        assert all(module.training is (index == 2) for module in (new, new.mix, new.feature_map, new.q_proj))
    assert len(model.model._forward_pre_hooks) == 1


@pytest.mark.parametrize("calls", [None, 1, 5])
def test_choosing_layers_leaves_no_trace(monkeypatch, calls):
    model = lived_in(**STRETCHED)
    options = dict(tokenizer=tiny_tokenizer(), length=48, calibration=ids(4, 64), window=8, memories=2)
    before = fingerprint(model)
    if calls is None:
        assert len(select_layers(model, TEXT, 1, **options)) == 1
    else:
        monkeypatch.setattr(selection, "key_loss", broken(selection.key_loss, KeyboardInterrupt(), calls))
        with pytest.raises(KeyboardInterrupt):
            select_layers(model, TEXT, 1, **options)
    assert fingerprint(model) == before
