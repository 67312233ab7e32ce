"""Which layers to leave as full attention: those without which hidden keys are lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_models._checks import check_weights
from liger_models._conversion import converted, plan_layers
from liger_models._decoder import Decoder
from liger_models._inputs import check_ids, input_device
from liger_models._snapshot import looked_at
from liger_models.configuration import LigerConfig
from liger_models.linearize import resolved
from liger_models.retrieval import make_prompt
from liger_models.text import find_tokenizer, token_ids
from liger_ops.errors import fail

# Prompts, and the seed of the first: `retrieval` hides other keys.
PROMPTS, SEED = 6, 5000


def select_layers(
    model: PreTrainedModel,
    text: str,
    keep: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 512,
    calibration: torch.Tensor | None = None,
    preset: str = "default",
    **changes: Any,
) -> list[int]:
    """The `keep` layers to leave as full attention when a model is linearized, the most needed first.

    Layers are ranked by what the model loses on six keys, hidden in `length` tokens of text, when one alone is
    linearized. Among the first 2 keep + 4 of them, one after the other is then taken that helps most beside those
    already taken, with all others linearized: about depth + 2 keep^2 passes over them. The model stays as it was.

    Args:
        model: a model that `linearize` takes.
        text: filler to hide keys in, at least `length` tokens.
        keep: how many layers.
        tokenizer: the model's; loaded by the model's name if None.
        length: tokens in which a key is hidden.
        calibration, preset, changes: as for `linearize`, for which the layers are chosen.

    Raises:
        ValueError: an unsupported model, no tokenizer, a short text, or a number of layers that there are not.
    """
    config = resolved(model, None, preset, None, changes)
    check_weights(model, config)
    open_to = [i for i, name in enumerate(config.pattern) if name not in ("full", "own")]
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= len(open_to):
        fail("keep", f"a number of layers from 0 to {len(open_to)}", repr(keep))
    device, tokenizer = input_device(model), tokenizer or _tokenizer(model)
    rows = hidden_keys(tokenizer, text, length, device)
    check_ids(model, [ids for ids, _ in rows])
    with torch.no_grad(), looked_at(model), _Bench.of(model, config, open_to, rows, calibration, tokenizer) as bench:
        return _choose(bench, keep)


def _choose(bench: _Bench, keep: int) -> list[int]:
    """Rank by what one linearized layer costs, then add greedily."""
    open_to = list(bench.others)
    pool = min(2 * keep + 4, len(open_to))
    bar = tqdm(total=len(open_to) + sum(pool - i for i in range(keep)), desc="Selecting layers", leave=False)
    inputs = bench.inputs(open_to)
    cost = {}
    for i in open_to:
        cost[i] = bench.loss([j for j in open_to if j != i], i, inputs)
        bar.update()
    ranked, kept = sorted(open_to, key=lambda i: -cost[i])[:pool], []
    while len(kept) < keep:
        inputs, cost = bench.inputs(kept), {}
        for i in (j for j in ranked if j not in kept):
            cost[i] = bench.loss([*kept, i], i, inputs)
            bar.update()
        kept.append(min(cost, key=lambda i: cost[i]))
    bar.close()
    return kept


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    found = find_tokenizer(model)
    if found is None:
        raise ValueError(f"tokenizer: expected the model's, found none under its name {model.config.name_or_path!r}")
    return found


def hidden_keys(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, device: torch.device, seed: int = SEED
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts with a hidden key: token ids [1,T] with the key at their end, and the key [A]."""
    filler, rows = torch.tensor(token_ids(tokenizer, text)), []
    for i in range(PROMPTS):
        prompt = make_prompt(tokenizer, filler, length, seed + i, (i + 0.5) / PROMPTS)
        answer = tokenizer(f" {prompt.key}", add_special_tokens=False)["input_ids"]
        rows.append((torch.tensor([prompt.ids + answer], device=device), torch.tensor(answer, device=device)))
    return rows


def key_loss(model: PreTrainedModel, ids: torch.Tensor, answer: torch.Tensor) -> float:
    """Mean loss on a key [A] that stands at the end of token ids [1,T]."""
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return F.cross_entropy(logits.float(), answer).item()


class _Held(nn.Module):
    """Stands for layers whose output is known."""

    def __init__(self, output: torch.Tensor | None):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self.output


def _unpadded(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What the decoder of a linearized model says of rows without padding, which that of a pretrained one does not."""
    return args, {**kwargs, "liger_mask": None}


class _Bench:
    """A model whose layers are as pretrained or linearized, as asked for, and what it then loses on the keys."""

    def __init__(self, model: PreTrainedModel, others: Mapping[int, nn.Module], rows: list):
        self.model, self.rows, self.others = model, rows, others
        self.decoder = Decoder(model)
        self.layers = list(self.decoder.layers)
        self.before = {i: self.decoder.attention(i) for i in others}

    @classmethod
    @contextmanager
    def of(
        cls, model: PreTrainedModel, config: LigerConfig, open_to: list[int], rows: list, calibration, tokenizer=None
    ):
        """A bench that may linearize the layers open_to, while it is needed; the model is as it was afterwards."""
        plans = [plan for plan in plan_layers(model.config, config) if plan.index in open_to]
        others = dict(converted(model, plans, calibration, tokenizer))
        for other in others.values():
            other.register_forward_pre_hook(_unpadded, with_kwargs=True)
        bench = cls(model, others, rows)
        try:
            yield bench
        finally:
            bench.put(bench.before)

    def put(self, kept: Iterable[int]) -> None:
        """Full attention in the layers kept, the linearized one in all others."""
        kept = set(kept)
        for i, other in self.others.items():
            self.decoder.put(i, self.before[i] if i in kept else other)

    def inputs(self, kept: Iterable[int]) -> list[list[torch.Tensor]]:
        """What goes into every layer, for every prompt."""
        self.put(kept)
        found = [[] for _ in self.rows]
        for (ids, _), held in zip(self.rows, found, strict=True):

            def look(module, args, kwargs, held=held):
                held.append(args[0] if args else kwargs["hidden_states"])

            hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self.layers]
            try:
                self.model(ids, use_cache=False, logits_to_keep=1)
            finally:
                for hook in hooks:
                    hook.remove()
        return found

    def loss(self, kept: Iterable[int], first: int, inputs: list[list[torch.Tensor]]) -> float:
        """Mean loss on the keys, where the layers before `first` are those that gave the inputs."""
        self.put(kept)
        total = 0.0
        try:
            for (ids, answer), held in zip(self.rows, inputs, strict=True):
                for i in range(first):
                    self.decoder.layers[i] = _Held(held[first] if i == first - 1 else None)
                total += key_loss(self.model, ids, answer)
        finally:
            for i in range(first):
                self.decoder.layers[i] = self.layers[i]
        return total / len(self.rows)
