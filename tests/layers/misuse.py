"""Ways to give a layer a state that is not its own: each ends in the right numbers or in one refusal."""

import torch

from liger_layers import LigerAttention, MixtureOfMemories, SlidingWindowAttention


def states():
    """States of one layer for another."""

    def layer(kind=LigerAttention, **options):
        torch.manual_seed(0)
        return kind(32, 4, 2, **{"window": 4, "sinks": 1, **options}).eval()

    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2))

    def across(one, other, change=lambda state: state, kind=torch.float32):
        held = one()(x[:, :12].to(next(one().parameters()).dtype))[1]
        found = other()(x[:, 12:].to(kind), state=change(held))[0]
        return found, other()(x.to(kind))[0][:, 12:]

    options = [dict(window=5), dict(sinks=0), dict(gate="gla"), dict(tau=4.0), dict(recall=2), dict(memories=2)]
    options += [dict(feature_map="softmax"), dict(mixing="sum"), dict(rope_theta=100.0), dict(pool="heads")]
    options += [dict(gate="gated_deltanet"), dict(kind=SlidingWindowAttention)]
    for one in options:
        yield f"layer with {one}", lambda one=one: across(lambda: layer(**one), layer)
    for kind in (torch.bfloat16, torch.float64):
        yield f"layer in {kind}", lambda kind=kind: across(lambda: layer().to(kind), layer)
        yield f"for a layer in {kind}", lambda kind=kind: across(layer, lambda: layer().to(kind), kind=kind)
    batch = dict(fewer=lambda x: x[:1], more=lambda x: x.repeat_interleave(2, 0), meta=lambda x: x.to("meta"))
    batch["halves"] = lambda x: x.half() if x.is_floating_point() else x
    for name, change in batch.items():
        yield f"state {name}", lambda change=change: across(layer, layer, lambda state: state.map(change))

    def memories(**told):
        torch.manual_seed(0)
        return MixtureOfMemories(32, 4, **{"memories": 3, **told}).eval()

    for one in (dict(rule="gla"), dict(memories=2), dict(shared=False), dict(router_shift=True), dict(conv_size=3)):
        yield f"memories with {one}", lambda one=one: across(lambda: memories(**one), memories)
    yield "memories in double", lambda: across(lambda: memories().double(), memories)
    for name, change in batch.items():
        yield f"memories {name}", lambda change=change: across(memories, memories, lambda state: state.map(change))
    yield "memories for a layer", lambda: across(memories, layer)
