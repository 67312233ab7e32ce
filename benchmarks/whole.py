"""Whole random Llamas, linearized without recall: padded and cached runs beside plain ones, times beside originals.

Shapes: B batch, T time.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import liger_models
from benchmarks.timing import milliseconds

LAYERS = 2


def llama(at: Any, **sizes: int) -> LlamaForCausalLM:
    """Random, of the heads that are measured; of the shape of an 8B's layers unless told."""
    torch.manual_seed(0)
    full = dict(hidden_size=at.heads.HQ * at.heads.D, intermediate_size=3584 * at.heads.HQ * at.heads.D // 1024)
    full |= dict(num_attention_heads=at.heads.HQ, num_key_value_heads=at.heads.H, head_dim=at.heads.D)
    config = LlamaConfig(**(full | dict(num_hidden_layers=LAYERS, vocab_size=512) | sizes))
    # Where it is made, its weights are drawn: fast on a GPU.
    with at.device:
        return LlamaForCausalLM(config).eval()


def checks(at: Any) -> dict[str, Any]:
    """Padded rows beside the row alone, cached beside uncached, a generation, finite gradients."""
    sizes = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    linear, row = liger_models.linearize(llama(at, **sizes), recall=0), {}
    ids = torch.randint(1, 512, (1, 300), device=at.device)
    with torch.no_grad():
        alone = linear(ids).logits
        pad, mask = torch.zeros(1, 40, dtype=ids.dtype, device=at.device), torch.ones_like(ids)
        for side in ("left", "right"):
            join = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
            logits = linear(join(pad, ids), attention_mask=join(torch.zeros_like(pad), mask)).logits
            logits = logits[:, 40:] if side == "left" else logits[:, :300]
            row[f"padded {side}"] = ((logits - alone).norm() / alone.norm()).item()
        first = linear(ids[:, :200], use_cache=True)
        rest = linear(ids[:, 200:], past_key_values=first.past_key_values, use_cache=True).logits
        row["cached"] = ((rest - alone[:, 200:]).norm() / alone[:, 200:].norm()).item()
        row["generated"] = linear.generate(ids[:, :100], max_new_tokens=8, do_sample=False).shape[1]
        row["bfloat16"] = ((linear.to(torch.bfloat16)(ids).logits - alone).norm() / alone.norm()).item()
    linear(ids, labels=ids).loss.backward()
    row["gradients are finite"] = all(p.grad.isfinite().all().item() for p in linear.parameters() if p.grad is not None)
    return row


def in_turns(runs: dict[str, Callable[[], Any]], at: Any) -> dict[str, float]:
    times = {name: [] for name in runs}
    for _ in range(at.rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, at.device, 1))
    return {f"{name}_ms": statistics.median(found) for name, found in times.items()}


def _models(at: Any) -> dict[str, LlamaForCausalLM]:
    ids = torch.randint(1, 512, (4, 128), device=at.device)
    linear = liger_models.linearize(llama(at), calibration=ids, recall=0)
    return dict(original=llama(at).to(torch.bfloat16), linear=linear.to(torch.bfloat16))


def prefill(at: Any) -> dict[str, float]:
    ids = torch.randint(1, 512, (1, at.lengths[-1]), device=at.device)

    def run(model: LlamaForCausalLM) -> Callable[[], Any]:
        return lambda: model(ids, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        return in_turns({n: run(model) for n, model in _models(at).items()}, at) | dict(T=at.lengths[-1])


def decode(at: Any) -> dict[str, float]:
    """One token of each of 16 sequences: the original's cache is full, a state is as large after any context."""
    B, T, models, caches = 2 if at.small else 16, at.lengths[-1], _models(at), {}
    token = torch.randint(1, 512, (B, 1), device=at.device)
    with torch.no_grad():
        short = torch.randint(1, 512, (B, 128), device=at.device)
        caches["linear"] = models["linear"](short, use_cache=True, logits_to_keep=1).past_key_values
        caches["original"] = DynamicCache()
        for layer in range(LAYERS):
            full = [torch.randn(B, at.heads.H, T, at.heads.D, device=at.device, dtype=torch.bfloat16) for _ in range(2)]
            caches["original"].update(*full, layer)

        def run(name: str) -> Callable[[], Any]:
            return lambda: models[name](token, past_key_values=caches[name], use_cache=True)

        return in_turns({n: run(n) for n in models}, at) | dict(B=B, T=T)


def training(at: Any) -> dict[str, float]:
    ids = torch.randint(1, 512, (1, at.lengths[0]), device=at.device)

    def run(model: LlamaForCausalLM) -> Callable[[], Any]:
        return lambda: model(ids, labels=ids).loss.backward()

    return in_turns({n: run(model) for n, model in _models(at).items()}, at) | dict(T=at.lengths[0])
