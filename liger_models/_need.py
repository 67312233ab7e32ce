"""What the queries of a pretrained model ask of tokens that a window has lost: the target of a layer's recall score.

Shapes: T tokens of a row, HQ query heads, H key/value heads, G = HQ / H, D head width, F features of a score.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_layers import RecallScore
from liger_layers.rotary import rotate
from liger_models._calibration import AT_ONCE, look_into
from liger_models._decoder import Decoder
from liger_models._hidden import with_hidden
from liger_models.data import Rows
from liger_models.families import Traits, traits

# Tokens of a row at least, and of one that a question fits into whatever is drawn: needs show beyond a window only.
_LENGTH, _FITTING = 512, 256
# Rows that ask for something, and the seed of what they ask for.
_ASKING, _SEED = 24, 7000
# The first tokens are sinks; of the last few too little is asked yet.
_SINKS, _TAIL = 4, 80
# Queries looked at together.
_ROWS = 256
# What a row has more that says parts of itself again, at most.
_AGAIN = 56
# Bytes of sums at once, of as many layers as fit and one at least: a share of the weights, from the least to the most.
_SHARE, _LEAST, _MOST = 12, 1 << 24, 1 << 30


class Need(NamedTuple):
    """Mean [F] and covariance [F,F] of a score's features, and theirs [F,H] with what later queries need of a token."""

    mean: torch.Tensor
    covariance: torch.Tensor
    cross: torch.Tensor


class _Running:
    """Sums over tokens, in double precision: means may be far larger than deviations."""

    def __init__(self, own: Traits):
        self.own, self.score, self.count = own, RecallScore(own.kv_heads, own.width), 0
        F, H = self.score.weight.shape[::-1]
        self.sums = torch.zeros(F + H, F, dtype=torch.float64)
        self.first = torch.zeros(F + H, dtype=torch.float64)

    def add(self, features: torch.Tensor, need: torch.Tensor) -> None:
        """features [N,F] and need [N,H]."""
        features, both = features.double().cpu(), torch.cat([features, need], -1).double().cpu()
        self.count += len(features)
        self.sums.addmm_(both.T, features)
        self.first += both.sum(0)

    def result(self) -> Need:
        """Of the sums, which it uses up."""
        # Rows may be too short for any token.
        F, count = self.sums.shape[1], max(self.count, 1)
        mean = self.first / count
        # In place, for they are large.
        moments = self.sums.div_(count).addr_(mean, mean[:F], alpha=-1)
        return Need(mean[:F], moments[:F], moments[F:].T)


def far_attention(
    q: torch.Tensor, k: torch.Tensor, window: int, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """Rotated q [T,HQ,D], k [T,H,D] -> [T,H]: the root of the squares that a token receives from beyond the window.

    Of full causal attention, summed over queries and the heads of a group: between the largest weight and their sum.
    """
    (T, HQ, _), H = q.shape, k.shape[1]
    found = q.new_zeros(H, T)
    for start in range(0, T, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, T), device=q.device)
        s = torch.einsum("ihgd,jhd->hgij", q[rows].unflatten(1, (H, HQ // H)), k[: rows[-1] + 1]) * scale
        s = s if softcap is None else softcap * (s / softcap).tanh()
        age = rows[:, None] - torch.arange(s.shape[-1], device=q.device)
        p = s.masked_fill(age < 0, -torch.inf).softmax(-1).masked_fill(age < window, 0.0)
        found[:, : s.shape[-1]] += p.square().sum((1, 2))
    return found.sqrt().T


def fit_scores(
    model: PreTrainedModel, rows: Sequence[torch.Tensor], windows: Mapping[int, int]
) -> dict[int, RecallScore]:
    """For layers by index, with their windows: scores fitted to what is needed on rows of token ids, [1,T] each.

    The sums of a layer grow with the square of its keys' and values' width: as many layers as fit are measured in a
    pass over the rows.
    """
    decoder, weights = Decoder(model), sum(p.numel() * p.element_size() for p in model.parameters())
    scores, groups, held = {}, [], 0
    limit = min(max(weights // _SHARE, _LEAST), _MOST)
    for index, window in windows.items():
        own = traits(decoder.attention(index), model.config)
        scores[index] = RecallScore(own.kv_heads, own.width)
        H, F = scores[index].weight.shape
        size = 8 * F * (F + H)
        if not groups or held + size > limit:
            groups.append({})
            held = 0
        groups[-1][index] = window
        held += size
    for group in groups:
        for index, need in measure_need(model, rows, group):
            scores[index].calibrate(*need)
    return scores


@torch.no_grad()
def measure_need(
    model: PreTrainedModel, rows: Sequence[torch.Tensor], windows: Mapping[int, int]
) -> Iterator[tuple[int, Need]]:
    """For layers by index, with their windows, one after the other: needs on rows of token ids, [1,T] each."""
    decoder = Decoder(model)
    sums = {index: _Running(traits(decoder.attention(index), model.config)) for index in windows}

    def look(index, q, k, v, tables):
        own, running = sums[index].own, sums[index]
        features = running.score.features(k.cpu(), v.cpu())
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        for i in range(len(q)):
            far = far_attention(q[i].float(), k[i].float(), windows[index], own.scale, own.softcap)
            need = far * v[i].float().norm(dim=-1)
            inner = slice(_SINKS, max(len(need) - _TAIL, _SINKS))
            running.add(features[i, inner], need[inner].cpu())

    look_into(model, _together(rows), windows, look, "Measuring what is recalled")
    for index in windows:
        yield index, sums.pop(index).result()


def _together(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows [1,T] of one length behind each other as [n,T], in as few passes as their tokens allow."""
    found: list[list[torch.Tensor]] = []
    for row in rows:
        last = found[-1] if found else []
        if last and last[0].shape == row.shape and (len(last) + 1) * row.shape[1] <= AT_ONCE:
            last.append(row)
        else:
            found.append([row])
    return [torch.cat(part) for part in found]


def asking_rows(
    ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, window: int, longest: int | None = None
) -> list[torch.Tensor]:
    """Token ids [rows,length] in rows that reach far beyond a window, and as many that ask for what was hidden in them.

    Where there is no tokenizer, or too little text for a question, rows say parts of themselves again. No row is longer
    than `longest`.
    """
    text = ids.flatten()
    length = min(max(_LENGTH, 2 * window + _TAIL), len(text), longest or len(text))
    plain = [row[None] for row in text.split(length) if len(row) == length]
    if tokenizer is None or length < _FITTING:
        return plain + _said_again(plain, longest)
    hidden = with_hidden(tokenizer, Rows((text,) * _ASKING, (text,) * _ASKING), 1.0, length, _SEED)
    return plain + [row[None] for row in hidden.ids]


def _said_again(rows: Sequence[torch.Tensor], longest: int | None) -> list[torch.Tensor]:
    """Each row, or what leaves room, with something out of place, and its own text, that come again at its end."""
    draw, found = random.Random(_SEED), []
    room = None if longest is None else max(1, longest - _AGAIN)
    for row in (x[0, :room].tolist() for x in rows):
        hidden, place = draw.sample(row, min(12, len(row))), draw.randint(0, len(row) // 2)
        start = draw.randint(0, len(row) // 2)
        found.append(row[:place] + hidden + row[place:] + row[start : start + 32] + hidden)
    return [torch.tensor([row]) for row in found]
