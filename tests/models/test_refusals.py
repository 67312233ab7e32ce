"""What linearize refuses: one clear line, and the model as it was."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from liger_models import LigerConfig, linearize
from tests.models.test_exactness import ids
from tests.models.tiny import linearize_tiny, tiny

SMALL = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_ff=16, num_layers=1, num_heads=2))


def deepseek():
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **sizes, **experts, intermediate_size=16))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (t5, "encoder-decoder"),
        (deepseek, "multi-head latent attention"),
        (lambda: BloomForCausalLM(BloomConfig(**SMALL)), "ALiBi"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)), "'gpt2' is not in"),
        (lambda: LlamaForSequenceClassification(tiny().config), "only the causal LM"),
        (lambda: linearize_tiny(tiny(), window=8), "already linearized"),
    ],
    ids=["t5", "deepseek", "bloom", "gpt2", "classifier", "twice"],
)  # fmt: skip
def test_architectures(make, reason):
    model = make()
    kind = type(model)
    with pytest.raises(ValueError, match=f"model: expected one of llama, mistral, qwen2, qwen3, got .*{reason}"):
        linearize(model)
    assert type(model) is kind


def nan(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def misshapen(model):
    model.model.layers[2].self_attn.k_proj = torch.nn.Linear(48, 20)


def missing(model):
    model.model.layers[0].self_attn.v_proj = None


def unloaded(model):
    model.to("meta")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, r"model.layers.1.mlp.up_proj.weight: expected finite values"),
        (misshapen, r"model.layers.2.self_attn.k_proj.weight: expected shape \[24, 48\], got \[20, 48\]"),
        (missing, r"model.layers.0.self_attn.v_proj.weight: expected a weight \[24, 48\], got none"),
        (unloaded, "expected a loaded weight, got one on the meta device"),
    ],
)
def test_damaged_weights(damage, message):
    model = tiny()
    damage(model)
    with pytest.raises(ValueError, match=message):
        linearize(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.model_type == "llama"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="best"), "preset: expected one of default, paper-gla, got 'best'"),
        (dict(gate="none"), "gate: expected one of gla, gated_retention"),
        (dict(feature_map="relu"), "feature_map: expected one of softmax, kernel"),
        (dict(windows=3), "windows: expected one of"),
        (dict(window=0), "window: expected an integer >= 1"),
        (dict(sinks=-1), "sinks: expected an integer >= 0"),
        (dict(mix=-0.5), "mix: expected a weight >= 0"),
        (dict(tau=0.0), "tau: expected a number > 0"),
        (dict(keep=[7]), r"keep: expected layer indices below 3, got \[7\]"),
        (dict(config=LigerConfig(), window=3), "config: expected alone"),
        (dict(config=LigerConfig(keep=(5,))), "keep: expected layer indices below 3"),
    ],
)
def test_options(options, message):
    model = tiny()
    x = ids(1, 9)
    with torch.no_grad():
        before = model(x).logits
        with pytest.raises(ValueError, match=message):
            linearize(model, **options)
        assert torch.equal(model(x).logits, before)


def test_a_square_mask_is_refused():
    with pytest.raises(ValueError, match="attention_mask: expected"):
        linearize_tiny(tiny(), window=8)(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
