"""What linearize refuses: one clear line, and the model as it was."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from liger_models import LigerConfig, linearize, linearize_on_disk, select_layers
from liger_models._inputs import CACHE
from liger_models.modeling import FAMILIES
from tests.models.test_atomic import fingerprint
from tests.models.test_exactness import ids
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer

SMALL = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_ff=16, num_layers=1, num_heads=2))


def deepseek():
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **sizes, **experts, intermediate_size=16))


def adapted():
    model = tiny()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


class Mine(LlamaForCausalLM):
    """Somebody's own, with a method that no family has."""

    def greet(self):
        return "hello"


def mine():
    return Mine(tiny().config)


def own_attention():
    class Attention(LlamaAttention):
        pass

    model = tiny()
    model.model.layers[1].self_attn = Attention(model.config, 1)
    return model


def lora(kind=LoraConfig, **options):
    with warnings.catch_warnings():
        # Its own use of names that transformers is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(tiny(), kind(target_modules=["k_proj", "up_proj"], **options))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (t5, "encoder-decoder"),
        (deepseek, "multi-head latent attention"),
        (lambda: BloomForCausalLM(BloomConfig(**SMALL)), "ALiBi"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)), "'gpt2' is not in"),
        (lambda: LlamaForSequenceClassification(tiny().config), "only the causal LM"),
        (lambda: linearize_tiny(tiny(), window=8), "already linearized"),
        (lambda: tiny("gemma3_text", use_bidirectional_attention=True), "not causal"),
        (adapted, "it carries adapters, which are to be merged first"),
        (lora, "PeftModel: it carries adapters, which are to be merged first"),
        (lambda: lora().base_model.model, "LlamaForCausalLM: it carries adapters, which are to be merged first"),
        (lambda: lora(IA3Config, feedforward_modules=["up_proj"]).base_model.model, "it carries adapters"),
        (lambda: "folder", "str: open 'folder' with checkpoint.load first, or convert .* with linearize_on_disk"),
        (lambda: Path("a") / "b", "Path: open 'a.b' with checkpoint.load first"),
        (lambda: None, "NoneType: it is no model"),
        (tiny_tokenizer, "it is no model"),
        (lambda: LlamaForCausalLM, "type: it is no model"),
        (lambda: torch.nn.Linear(2, 2), "Linear: it is no pretrained model"),
        (lambda: torch.nn.Sequential(tiny()), "Sequential: linearize the LlamaForCausalLM in it, and wrap that"),
        (lambda: torch.nn.DataParallel(tiny()), "DataParallel: linearize the LlamaForCausalLM in it, and wrap that"),
        (lambda: tiny().model, "it is a LlamaModel; only the causal LM"),
        (mine, "Mine: its class, which is derived from LlamaForCausalLM, would be lost; linearize a LlamaForCausalLM"),
        (own_attention, "its attention is a Attention, whose code would be lost"),
    ],
    ids=["t5", "deepseek", "bloom", "gpt2", "classifier", "twice", "embedding", "adapted", "peft", "lora", "ia3",
         "name", "path", "none", "tokenizer", "class", "module", "wrapped", "parallel", "decoder", "subclass",
         "attention"],
)  # fmt: skip
@pytest.mark.parametrize("convert", [linearize, partial(select_layers, text="", keep=1)], ids=["linearize", "select"])
def test_architectures(make, reason, convert):
    model = make()
    kind, before = type(model), fingerprint(model) if isinstance(model, torch.nn.Module) else None
    wanted = f"model: expected one of llama, mistral, .*, olmoe, got .*{reason}"
    with pytest.raises(ValueError, match=wanted) as refused:
        convert(model)
    assert type(model) is kind and "\n" not in str(refused.value)
    if before is not None:
        assert fingerprint(model) == before


def test_merged_adapters_are_none():
    model = lora().merge_and_unload()
    assert linearize_tiny(model, window=8, memories=2) is model


def nan(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def misshapen(model):
    model.model.layers[2].self_attn.k_proj = torch.nn.Linear(48, 20)


def missing(model):
    model.model.layers[0].self_attn.v_proj = None


def unloaded(model):
    model.to("meta")


def cut(model):
    k_proj = model.model.layers[2].self_attn.k_proj
    k_proj.weight = torch.nn.Parameter(k_proj.weight[:20].clone())


def packed(model):
    class Packed(torch.nn.Module):
        """As GPTQ and AWQ have them."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 48, 24
            self.register_buffer("qweight", torch.zeros(6, 24, dtype=torch.int32))

    model.model.layers[1].self_attn.v_proj = Packed()


def eighths(model):
    model.to(torch.float8_e4m3fn)


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, r"model.layers.1.mlp.up_proj.weight: expected finite values"),
        (misshapen, r"model.layers.2.self_attn.k_proj.weight: expected shape \[24, 48\], got \[20, 48\]"),
        (missing, r"model.layers.0.self_attn.v_proj.weight: expected a weight \[24, 48\], got none"),
        (unloaded, "expected a loaded weight, got one on the meta device"),
        (cut, r"model.layers.2.self_attn.k_proj.weight: expected shape \[24, 48\], got \[20, 48\]"),
        (packed, r"model.layers.1.self_attn.v_proj.weight: expected a weight \[24, 48\], got none"),
        (dynamic, r"model.layers.0.self_attn.q_proj.weight: expected a weight \[48, 48\], got one packed away; line"),
        (eighths, "q_proj.weight: expected torch.float16, .* got torch.float8_e4m3fn; linearize first, quantize after"),
    ],
)
def test_damaged_weights(damage, message):
    model = tiny()
    damage(model)
    kinds, config = [type(x) for x in model.modules()], model.config.to_dict()
    for convert in (linearize, partial(select_layers, text="", keep=1)):
        with pytest.raises(ValueError, match=message) as refused:
            convert(model)
        assert "\n" not in str(refused.value)
    assert [type(x) for x in model.modules()] == kinds and model.config.to_dict() == config


class Quantized(torch.Tensor):
    """A weight in a format of its own, which knows how to be multiplied and nothing else."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.codes * weight.scale, bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a {cls.__name__}")


def quantized(model):
    for layer in model.model.layers:
        for part in [x for x in layer.modules() if isinstance(x, torch.nn.Linear)]:
            part.weight = torch.nn.Parameter(Quantized(part.weight.detach()), requires_grad=False)
    return model


def test_weights_of_a_type_of_their_own_stay_as_they_are():
    model, plain, x = quantized(tiny()), tiny(), ids(2, 40)
    with torch.no_grad():
        for mine, other in zip(model.modules(), plain.modules(), strict=True):
            if isinstance(getattr(mine, "weight", None), Quantized):
                other.weight.copy_(mine.weight.codes * mine.weight.scale)
        before = [x for name, x in model.named_parameters()]
        wanted = linearize_tiny(plain, window=8)(x).logits
        assert torch.equal(linearize_tiny(model, window=8)(x).logits, wanted)
    kept = {id(x) for x in model.parameters()}
    assert all(id(x) in kept for x in before)


def test_memories_are_no_copies_of_quantized_weights():
    model = quantized(tiny())
    before = [*model.modules()]
    wanted = (
        "layers.0.self_attn.k_proj.weight: expected .*torch.float64 with memories, got a Quantized; linearize first"
    )
    with pytest.raises(ValueError, match=wanted):
        linearize_tiny(model, window=8, memories=2)
    assert [*model.modules()] == before and type(model) is LlamaForCausalLM


def test_a_folder_is_a_name(tmp_path):
    with pytest.raises(ValueError, match="model: expected a local folder, got LlamaForCausalLM"):
        linearize_on_disk(tiny(), tmp_path / "out")
    model = tiny()
    model.model.layers[1].mlp.up_proj.to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=r"up_proj.weight: expected one of torch.float16, .* got torch.float8_e4m3fn"):
        linearize_on_disk(tmp_path / "in", tmp_path / "out", calibration=ids(2, 40))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="best"), "preset: expected one of default, paper-gla, paper-gsa, paper-hgrn2, got 'best'"),
        (dict(gate="none"), "gate: expected one of gla, gsa, hgrn2, .*, kda, got 'none'"),
        (dict(feature_map="relu"), "feature_map: expected one of softmax, kernel"),
        (dict(windows=3), "windows: unknown; expected one of"),
        (dict(window=0), "window: expected an integer >= 1"),
        (dict(sinks=-1), "sinks: expected an integer >= 0"),
        (dict(mix=-0.5), "mix: expected a weight >= 0"),
        (dict(tau=0.0), "tau: expected a number > 0"),
        (dict(tau="16"), "tau: expected a number > 0, got '16'"),
        (dict(gate=["gla"]), r"gate: expected one of gla, .*, got \['gla'\]"),
        (dict(keep=[1.7]), r"keep: expected indices of layers, got \[1.7\]"),
        (dict(keep="12"), "keep: expected indices of layers, got '12'"),
        (dict(keep=1), "keep: expected indices of layers, got 1"),
        (dict(keep=[True, False, True]), "keep: expected indices of layers"),
        (dict(pattern=3), "pattern: expected letters, a list of names, or names by index, got 3"),
        (dict(keep=[7]), r"keep: expected layer indices from -3 to 2, got \[7\]"),
        (dict(pattern="LLZ"), "pattern: expected letters of L liger, F full, .*K liger:kda, got 'Z'"),
        (dict(pattern=["full", "half"]), "pattern: expected names of liger, memories, window, full, own, got 'half'"),
        (dict(pattern="LLLF"), "pattern: expected at most 3 layers, as deep as the model, got 4"),
        (dict(pattern={5: "full"}), r"pattern: expected layer indices from -3 to 2, got \[5\]"),
        (dict(pattern="GF", memories=2), "memories: expected 0 with a pattern that has no place for them, got 2"),
        (dict(pattern=["own"]), "pattern: expected a window of its own in layer 0, which sees everything"),
        (dict(mix=float("nan")), "mix: expected a weight >= 0"),
        (dict(tau=float("inf")), "tau: expected a number > 0"),
        (dict(learn_mix="no"), "learn_mix: expected True or False"),
        (dict(calibration=torch.randint(3, 97, (4, 8))), "calibration: expected token ids"),
        (dict(calibration=torch.zeros(0, 50, dtype=torch.long)), "calibration: expected token ids"),
        (dict(calibration=torch.zeros(50, dtype=torch.long)), "calibration: expected token ids"),
        (dict(calibration=torch.full((2, 50), 97)), "calibration: expected ids from 0 to 96, got 97 to 97"),
        (dict(calibration=[1, 2]), "calibration: expected token ids .* got list"),
        (dict(config=LigerConfig(), window=3), "config: expected alone"),
        (dict(config={}), "config: expected a LigerConfig, got {}"),
        (dict(preset=["default"]), "preset: expected one of default, paper-gla"),
        (dict(mix=True), r"mix: expected a weight >= 0 of at most 1e\+09, got True"),
        (
            dict(pattern={-1: "full", 2: "liger"}),
            r"pattern: expected a layer once, got indices \[-1, 2\] of 3 layers",
        ),
        (dict(config=LigerConfig(keep=(5,))), "keep: expected layer indices from -3 to 2"),
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


def test_a_model_that_is_not_linearized_is_not_opened_as_one(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config: expected that of a linearized model, with a section liger, got None"):
        FAMILIES["llama"][1].from_pretrained(tmp_path)


def test_a_static_cache_is_refused():
    model = linearize_tiny(tiny(), window=8, keep=[1])
    with pytest.raises(ValueError, match=f"{CACHE}: expected a DynamicCache, got a StaticCache"):
        model(ids(1, 5), **{CACHE: StaticCache(config=model.config, max_cache_len=64)})


def test_a_square_mask_is_refused():
    with pytest.raises(ValueError, match="attention_mask: expected"):
        linearize_tiny(tiny(), window=8)(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
