"""A family of the user's own, whose decoder and attention lie elsewhere than in a Llama."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from liger_models import FAMILIES, Family, evaluate, finetune, linearize_on_disk, register_family, select_layers
from liger_models._inputs import CACHE
from liger_models.families import KNOWN
from tests.models.test_exactness import ids
from tests.models.tiny import SIZES, TEXT, linearize_tiny, tiny_tokenizer


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim, self.scaling = layer_idx, config.head_dim, config.head_dim**-0.5
        width = config.head_dim * config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, config.head_dim * config.num_key_value_heads)
        self.v_proj = nn.Linear(config.hidden_size, config.head_dim * config.num_key_value_heads)
        self.o_proj = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if kwargs.get(CACHE) is not None:
            k, v = kwargs[CACHE].update(k, v, self.layer_idx)
        o = nn.functional.scaled_dot_product_attention(
            q, k, v, attention_mask, is_causal=attention_mask is None and q.shape[2] > 1, enable_gqa=True
        )
        return self.o_proj(o.transpose(1, 2).flatten(2)), None


class OwnBlock(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(config.hidden_size), nn.Module()
        self.inner.attn = OwnAttention(config, index)

    def forward(self, x, **kwargs):
        return x + self.inner.attn(self.norm(x), **kwargs)[0]


class OwnPreTrained(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"


class OwnDecoder(OwnPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleDict({"blocks": nn.ModuleList(OwnBlock(config, i) for i in range(3))})
        self.turn = LlamaRotaryEmbedding(config)
        self.last = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        x, cache = self.wte(input_ids) if inputs_embeds is None else inputs_embeds, cache or past_key_values
        seen, T = 0 if cache is None else cache.get_seq_length(), x.shape[1]
        if position_ids is None:
            position_ids = seen + torch.arange(T)[None]
        mask = torch.ones(T, seen + T, dtype=torch.bool).tril(seen)
        if attention_mask is not None and attention_mask.ndim == 2:
            mask = mask & attention_mask[:, None, None].bool()
        tables = self.turn(x, position_ids)
        for block in self.stack["blocks"]:
            x = block(x, position_embeddings=tables, attention_mask=mask, **{CACHE: cache}, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.last(x), **{CACHE: cache})


class OwnForCausalLM(OwnPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.body, self.head = OwnDecoder(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, return_dict=True, **kwargs):
        out = self.body(input_ids, attention_mask, **kwargs)
        logits = self.head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})


OWN = Family(OwnConfig, OwnForCausalLM, decoder="body", layers="stack.blocks", attention="inner.attn", rotary="turn")


@pytest.fixture(scope="module")
def registered():
    AutoConfig.register("own", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    register_family(OWN)
    yield
    # Other tests are about the families that everybody has.
    del KNOWN["own"], FAMILIES["own"]


@pytest.fixture
def own(registered):
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(**SIZES)).eval()
    for block in model.body.stack["blocks"]:
        for projection in (block.inner.attn.q_proj, block.inner.attn.k_proj):
            projection.weight.data.mul_(8)
    return model


@torch.no_grad()
def test_it_is_exact_within_the_window_and_near_beyond(own):
    x, original = ids(2, 60), copy.deepcopy(own)
    wide = linearize_tiny(copy.deepcopy(own), window=64)
    assert (wide(x).logits - original(x).logits).abs().max() <= 1e-4
    far, none = (
        (linearize_tiny(copy.deepcopy(own), window=8, **options)(x).logits - original(x).logits).norm()
        for options in (dict(), dict(pattern="W"))
    )
    assert far < none
    assert [type(block.inner.attn).__name__ for block in wide.body.stack["blocks"]] == ["LinearizedAttention"] * 3


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(), dict(pattern="MFW", memories=2), dict(gate="kda")], ids=str)
def test_it_generates_saves_and_loads(own, options, tmp_path):
    x = ids(2, 24)
    model = linearize_tiny(own, window=8, **options)
    assert type(model) is FAMILIES["own"][1]
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=4, eos_token_id=None, do_sample=False)
    whole = model(out, use_cache=False).logits
    assert torch.equal(whole[:, 23:-1].argmax(-1), out[:, 24:])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.liger == model.config.liger
    assert torch.equal(again(out, use_cache=False).logits, whole)


@torch.no_grad()
def test_padding_in_front_changes_nothing(own):
    model, x = linearize_tiny(own, window=8, pattern="LFL"), ids(1, 30)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(x)], 1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], 1)
    assert (model(padded, attention_mask=mask).logits[:, 5:] - model(x).logits).abs().max() <= 1e-4


def test_on_disk_it_is_as_in_memory(own, tmp_path):
    own.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    calibration = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))
    linearize_on_disk(tmp_path / "model", tmp_path / "disk", calibration=calibration, window=8, recall=0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "disk").state_dict()
    wanted = linearize_tiny(own, window=8).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], x) for key, x in wanted.items())


def test_layers_are_chosen_and_it_is_fine_tuned(own):
    calibration, tokenizer = ids(4, 64), tiny_tokenizer()
    keep = select_layers(own, TEXT, 1, tokenizer=tokenizer, length=64, calibration=calibration, window=8)
    model = linearize_tiny(own, window=8, keep=keep)
    before = evaluate(model, tokenizer, TEXT, length=32, max_blocks=4)
    model = finetune(model, tokenizer, TEXT, steps=4, length=32)
    after = evaluate(model, tokenizer, TEXT, length=32, max_blocks=4)
    assert after["perplexity"] < before["perplexity"] != before["perplexity_window_only"]


class Typeless(OwnConfig):
    model_type = ""


class TypelessForCausalLM(OwnForCausalLM):
    config_class = Typeless


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("own", "family: expected a Family, got 'own'"),
        (OWN, "family: expected a model type that is not taken, got 'own'"),
        (KNOWN["llama"], "family: expected a model type that is not taken, got 'llama'"),
        (Family(OwnConfig(), OwnForCausalLM), "config: expected a class derived from PreTrainedConfig, got OwnConfig"),
        (Family(dict, OwnForCausalLM), "config: expected a class derived from PreTrainedConfig, got <class 'dict'>"),
        (Family(OwnConfig, OwnBlock), "model: expected a class derived from PreTrainedModel, got <class"),
        (Family(OwnConfig, LlamaForCausalLM), "model: expected a class with config_class OwnConfig, got LlamaForCausa"),
        (Family(Typeless, TypelessForCausalLM), "config: expected a class with a model_type, got Typeless"),
        (dataclasses.replace(OWN, layers=None), "layers: expected a name, got None"),
        (dataclasses.replace(OWN, rotary=""), "rotary: expected a name, or None, got ''"),
    ],
)
def test_what_is_no_family_of_its_own_is_refused(registered, family, message):
    with pytest.raises(ValueError, match=message):
        register_family(family)


def test_a_class_whose_name_is_taken_is_refused(registered):
    config = type("LlamaConfig", (OwnConfig,), {"model_type": "another"})
    model = type("AnotherForCausalLM", (OwnForCausalLM,), {"config_class": config})
    with pytest.raises(ValueError, match="family: expected classes of names that are not taken, got LlamaConfig"):
        register_family(Family(config, model))
    assert "another" not in KNOWN


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (dict(decoder="model"), "model: expected a decoder at 'model', as its family says, got none in OwnForCausalLM"),
        (dict(layers="h"), "model: expected layers at 'body.h', as its family says, got none in OwnForCausalLM"),
        (dict(layers="stack"), "model: expected layers at 'body.stack', as its family says, got a ModuleDict there"),
        (dict(attention="attn"), "model: expected an attention in layer 0 at 'attn', as its family says, got none in"),
        (dict(rotary="rotary"), "model: expected a rotary embedding at 'rotary', as its family says, got none in"),
    ],
)
def test_what_is_not_where_the_family_says_is_named(own, monkeypatch, places, message):
    monkeypatch.setitem(KNOWN, "own", dataclasses.replace(OWN, **places))
    with pytest.raises(ValueError, match=message):
        linearize_tiny(own)
    assert type(own) is OwnForCausalLM
