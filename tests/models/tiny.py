"""Tiny random models of every family."""

import torch

from liger_models import linearize
from liger_models.families import KNOWN

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_EXPERTS = dict(num_experts_per_tok=2, num_experts=4, moe_intermediate_size=32)
# What each family has that a Llama has not, in the shape that its own released models have.
_OPTIONS = {
    "llama": dict(attention_bias=True),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    # sdpa, which transformers before 5.21 would choose, drops the bound of its scores.
    "gemma2": dict(
        attn_implementation="eager",
        head_dim=16,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=12,
    ),
    "gemma3_text": dict(
        head_dim=16, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=12
    ),
    "phi3": dict(partial_rotary_factor=0.5),
    "smollm3": dict(no_rope_layers=[1, 0, 1], num_hidden_layers=3),
    "olmo2": dict(),
    "granite": dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(**_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": dict(**_EXPERTS, head_dim=16),
    "olmoe": dict(num_experts_per_tok=2, num_experts=4, clip_qkv=1.5),
}
NAMES = tuple(KNOWN)
# Enough of them where a test is about something else.
FEW = ("llama", "qwen3", "gemma2", "phi3", "olmoe")


def tiny(name: str = "llama", scale: float = 8.0, **options):
    """A random model in float32 whose attention is sharp enough to matter."""
    torch.manual_seed(0)
    family = KNOWN[name]
    model = family.model(family.config(**(SIZES | _OPTIONS[name] | options))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for part in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
                module = getattr(attention, part, None)
                if module is None:
                    continue
                if part != "v_proj":
                    module.weight.mul_(scale)
                if module.bias is not None:
                    module.bias.normal_()
            for norm in ("q_norm", "k_norm"):
                if hasattr(attention, norm):
                    getattr(attention, norm).weight.uniform_(0.5, 1.5)
    return model


def checkpoint_activations(model, **options):
    """Switch it on, under the name that the installed transformers has."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options or None)


def tiny_tokenizer(before: str = "", after: str = "", chat_template: str | None = None):
    """One token a printable character; ids 0, 1, 2 are padding, start and end.

    before, after: the special tokens that it puts around a text by itself, such as "<s>".
    """
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c not in "\r\x0b\x0c"][:93]
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if before or after:
        special = [(token, vocabulary[token]) for token in (before, after) if token]
        tokenizer.post_processor = processors.TemplateProcessing(f"{before} $A {after}".strip(), special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def linearize_tiny(model, **options):
    """linearize, measured on given tokens: drawing them takes a second that hundreds of tests need not spend.

    Nothing is recalled unless asked for: small windows on short texts would leave nothing to the recurrence.
    """
    if "config" not in options:
        options = {"recall": 0, **options}
    calibration = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))
    return linearize(model, calibration=calibration, **options)


TEXT = "the quick brown fox jumps over the lazy dog. " * 60
