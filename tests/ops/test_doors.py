"""Every argument of every op beside everything that it is not: a ValueError in its name, before anything has run.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, M features or slots, W window.
"""

import inspect
import math
import re

import pytest
import torch

import liger_ops

B, T, HQ, H, K, V, M, W = 2, 9, 4, 2, 6, 5, 3, 4


def decay(*shape):
    return -torch.rand(B, T, *shape)


def qkv(**more):
    q, k, v = (torch.randn(B, T, n, width) for n, width in ((HQ, K), (H, K), (H, V)))
    return dict(q=q, k=k, v=v) | more


def rwkv6():
    x = qkv(w=decay(H, K), u=torch.randn(HQ, K))
    return dict(r=x.pop("q")) | x


def slots():
    return qkv(s=torch.randn(B, T, H, M), g=decay(H, M))


def joint():
    k, v = torch.randn(B, T + W, H, K), torch.randn(B, T + W, H, V)
    logs = dict(q_log=torch.randn(B, T, HQ, M), k_log=torch.randn(B, T, H, M), score=torch.randn(B, T, H))
    return qkv(**logs, g=decay(H, M), mix=torch.ones(HQ), window=W, sinks=1, recall=2) | dict(k=k, v=v)


# What is right for an op; the ops of a row take the same.
RIGHT = {
    "chunk_gla fused_chunk_gla": lambda: qkv(g=decay(H, K)),
    "fused_recurrent_gla": lambda: qkv(gk=decay(H, K)),
    "chunk_simple_gla fused_recurrent_simple_gla": lambda: qkv(g=decay(H)),
    "chunk_retention fused_chunk_retention parallel_retention fused_recurrent_retention": qkv,
    "chunk_linear_attn fused_chunk_linear_attn fused_recurrent_linear_attn": qkv,
    "chunk_lightnet fused_recurrent_lightnet": qkv,
    "chunk_lightning_attn fused_recurrent_lightning_attn": lambda: qkv(layer_idx=1, num_layers=4),
    "chunk_hgrn2 fused_recurrent_hgrn2": lambda: {n: x for n, x in qkv(g=decay(H, K)).items() if n != "k"},
    "chunk_delta_rule fused_recurrent_delta_rule": lambda: qkv(beta=torch.rand(B, T, H)),
    "chunk_gated_delta_rule fused_recurrent_gated_delta_rule": lambda: qkv(g=decay(H), beta=torch.rand(B, T, H)),
    "chunk_kda fused_recurrent_kda": lambda: qkv(g=decay(H, K), beta=torch.rand(B, T, H)),
    "chunk_rwkv6 fused_recurrent_rwkv6": rwkv6,
    "chunk_gsa fused_recurrent_gsa": slots,
    "mlstm": lambda: qkv(i=torch.randn(B, T, H), f=decay(H)),
    "sliding_window_attention": lambda: qkv(window=W, sinks=1, softcap=3.0),
    "liger_attention": joint,
}
CASES = [(name, right) for names, right in RIGHT.items() for name in names.split()]
TENSORS = {
    "scalar": torch.tensor(1.0),
    "vector": torch.ones(3),
    "matrix": torch.ones(2, 2),
    "rank 3": torch.ones(B, T, H),
    "longer": torch.ones(B, T + 1, H, K),
    "integers": torch.ones(B, T, H, K, dtype=torch.int64),
    "complex": torch.ones(B, T, H, K, dtype=torch.complex64),
    "booleans": torch.ones(B, T, H, K, dtype=torch.bool),
    "meta": torch.empty(B, T, H, K, device="meta"),
    "sparse": torch.ones(B, T, H, K).to_sparse(),
    "half": torch.ones(B, T, H, K, dtype=torch.float16),
    "double": torch.ones(B, T, H, K, dtype=torch.float64),
    "no row": torch.ones(0, T, H, K),
    "no head": torch.ones(B, T, 0, K),
    "no width": torch.ones(B, T, H, 0),
}
OTHERS = (None, 0, 1, -1, 2.5, 10**30, True, "x", {}, [], 1j, math.nan, math.inf, object(), len)
# Numbers that some arguments may be; flags may be True, and what need not be given may be None.
NUMBERS = {
    "scale": (0, 1, -1, 2.5),
    "softcap": (1, 2.5, 10**30),
    "max_seqlen": (0, 1),
    "sinks": (0, 1),
    "layer_idx": (0, 1),
    **dict.fromkeys(("chunk_size", "window", "recall", "num_layers"), (1,)),
    "mix": (0, 1, 2.5, 10**30),
    "checkpoint_level": (0, 1),
}


def may_be(parameter, right, value):
    """Whether an op may take this."""
    name, default = parameter.name, parameter.default
    if isinstance(value, torch.Tensor):
        same = right.get(name)
        fits = isinstance(same, torch.Tensor) and (same.ndim, same.dtype) == (value.ndim, value.dtype)
        return (fits and value.layout == torch.strided and not value.is_meta) or (
            name in ("scale", "mix") and not value.ndim
        )
    flag = isinstance(default, bool) or parameter.annotation == bool | None
    if value is None:
        return default is None or flag or name in ("g", "gk", "beta")
    return value is True if flag else not isinstance(value, bool) and value in NUMBERS.get(name, ())


def judged(name, right):
    """(what is given, whether it is taken, what is wrong with that or None) for every argument and every value."""
    op = getattr(liger_ops, name)
    parameters = inspect.signature(op).parameters
    for parameter in parameters.values():
        for value in (*TENSORS.values(), *OTHERS):
            given, taken, why = f"{parameter.name} = {value!r}", True, None
            try:
                op(**right | {parameter.name: value})
                why = None if may_be(parameter, right, value) else "it was taken"
            except ValueError as error:
                taken, said = False, re.fullmatch(r"(\w+)[^:]*: expected .*, got .*", str(error))
                why = None if said and said[1] in parameters else str(error)
            except Exception as error:
                taken, why = False, f"{type(error).__name__}: {error}"
            yield given, taken, why


@pytest.mark.parametrize(("name", "right"), CASES, ids=[name for name, _ in CASES])
def test_what_an_argument_is_not(name, right):
    op, right = getattr(liger_ops, name), right()
    op(**right)
    found = list(judged(name, right))
    assert not [f"{given}: {why}" for given, _, why in found if why]
    assert sum(taken for _, taken, _ in found) >= len(inspect.signature(op).parameters) // 2
