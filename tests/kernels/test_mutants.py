"""Faults seeded into the kernels, one at a time: what the tests above must notice."""

import importlib
import itertools
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import liger_ops._triton
from liger_ops import naive_delta_rule, naive_recurrence
from tests.kernels import test_delta
from tests.kernels.cases import Case, distances, exact, run
from tests.kernels.interpreter import mend_rounding, sanitized
from tests.kernels.test_additive import BARS, CLEAN

mend_rounding()
SOURCE = Path(liger_ops._triton.__file__).parent
# File, what stands there, what stands there instead, which occurrence.
MUTANTS = [
    ("tiles", "mask=m_r[:, None] & (o_d < D)[None, :], other=0.0", "mask=m_r[:, None], other=0.0", 0),
    ("tiles", "mask=m_r[:, None] & (o_d < D)[None, :], other=0.0", "mask=(o_d < D)[None, :], other=0.0", 0),
    ("tiles", "& (o_d < D)[None, :], other=0.0)", "& (o_d < D)[None, :])", 0),
    ("tiles", "& (o_d < D)[None, :], other=0.0)", "& (o_d <= D)[None, :], other=0.0)", 0),
    ("tiles", "b_x, mask=m_r[:, None] & (o_d < D)[None, :])", "b_x, mask=(o_d < D)[None, :])", 0),
    ("tiles", "b_x, mask=m_r[:, None] & (o_d < D)[None, :])", "b_x, mask=m_r[:, None])", 0),
    ("tiles", "* H + i_h)[:, None] * D", "* H + i_h)[:, None] * (D + 1)", 0),
    ("tiles", "* H + i_h)[:, None] * D", "* (H + 1) + i_h)[:, None] * D", 0),
    ("tiles", "* H + i_h)[:, None] * D", "* H)[:, None] * D", 0),
    ("tiles", "chunks + i_c * 2 + 1", "chunks + i_c * 2 + 3", 0),
    ("tiles", "b_g, 0, reverse=REVERSE)", "b_g, 0)", 0),
    ("tiles", "[b_g.shape[0]]), 0, reverse=REVERSE)", "[b_g.shape[0]]), 0)", 0),
    ("tiles", "m_a = (o_r[:, None] >= o_r[None, :]) & (o_r < n)[:, None]", "m_a = (o_r < n)[:, None]", 0),
    ("decays", "o_r < n - 1)", "o_r < n)", 0),
    ("decays", "load_decays(g, i_t + 1, i_h", "load_decays(g, i_t, i_h", 0),
    ("decays", "scan(b_next, REVERSE=True)", "scan(b_next)", 0),
    ("decays", "i_g * BG + tl.arange(0, BG)", "tl.arange(0, BG)", 0),
    ("decays", "m_e = m_r[:, None] & (o_r[:, None] >= o_r[None, :])", "m_e = o_r[:, None] >= o_r[None, :]", 0),
    ("decays", "b_lowest >= FACTORABLE", "b_lowest >= 99 * FACTORABLE", 0),
    ("decays", "(i_c * H + i_h) * (C // R)", "i_c * H * (C // R)", 0),
    ("tiles", "m_later = o_r[:, None] > o_r", "m_later = o_r[:, None] >= o_r", 0),
    ("states", "m_r = o_r < n", "m_r = o_r < n + 1", 0),
    ("states", "n = tl.minimum(i_end - i_t, C)", "n = C", 0),
    ("states", "tl.cdiv(i_end - i_begin, C)", "(i_end - i_begin) // C", 0),
    ("states", "i_begin + i_c * C", "i_begin + i * C", 0),
    ("states", "i_first + i_c) * H + i_h", "i_c) * H + i_h", 0),
    ("states", "i_first + i_c) * H + i_h", "i_first + i_c) * H", 0),
    ("states", "i_first + i_c) * H", "i_first + i) * H", 0),
    ("states", "i_nh // H, i_nh % H", "i_nh // H, i_nh // H", 0),
    ("states", "o_k[:, None] * V + o_v[None, :]", "o_k[:, None] * K + o_v[None, :]", 0),
    ("states", "m_h = (o_k < K)[:, None] & (o_v < V)[None, :]", "m_h = (o_k < K)[:, None] & (o_v >= 0)[None, :]", 0),
    ("states", "b_h, mask=m_h)", "b_h)", 0),
    ("states", "b_h *= b_decay[:, None]", "b_h *= b_w", 0),
    ("states", "to if REVERSE else behind", "behind if REVERSE else to", 0),
    ("states", "(i_t + n - 1) * H + i_h", "(i_t + n - 2) * H + i_h", 0),
    ("states", "b_k * b_w * scale", "b_k * b_w", 0),
    ("states", "PRECISION) * scale", "PRECISION)", 0),
    ("states", "i_h * R + i_r, H * R, V", "i_h * R, H * R, V", 0),
    ("states", "b_h = tl.load(first", "b_h = 0.0 * tl.load(first", 0),
    ("outputs", "i_h, HQ = i_q // G, H * G", "i_h, HQ = i_q // H, H * G", 0),
    ("outputs", "i_v * BV + tl.arange(0, BV)", "tl.arange(0, BV)", 0),
    ("outputs", "i_k * BK + tl.arange(0, BK)", "tl.arange(0, BK)", 0),
    ("outputs", "b_o *= load_rows(to", "b_o += 0.0 * load_rows(to", 0),
    ("outputs", "b_a *= load_pairs(e", "b_a += 0.0 * load_pairs(e", 0),
    ("outputs", "b_k * load_rows(behind", "b_k + 0.0 * load_rows(behind", 0),
    ("outputs", "b_a = tl.where(o_r[:, None] >= o_r[None, :], b_a, 0.0)", "b_a = b_a * 1.0", 0),
    ("outputs", "b_o * scale", "b_o", 0),
    ("outputs", "dot(b_k, b_dh, PRECISION)", "dot(b_k, b_dh * scale, PRECISION)", 0),
    ("outputs", "dot(b_k, tl.trans(b_q), PRECISION)", "dot(b_q, tl.trans(b_k), PRECISION)", 0),
    ("outputs", "            b_a *= b_e\n", "", 0),
    ("outputs", "i_q = i_h * G + i_g", "i_q = i_h * G", 0),
    ("pairs", "m_r & (o_r % R > 0)", "m_r", 0),
    ("pairs", "m_r & (o_r % R > 0)", "m_r", 1),
    ("pairs", "o_r < n - 1)", "o_r < n)", 0),
    ("pairs", "i_t + 1, i_h", "i_t, i_h", 0),
    ("pairs", "i_t + 1, i_h", "i_t + 2, i_h", 1),
    ("pairs", "C // R, R, b_g.shape[1]]), 1, reverse=REVERSE)", "C // R, R, b_g.shape[1]]), 1)", 0),
    ("pairs", "o_r % R == 0)[:, None], b_near", "o_r % R == 1)[:, None], b_near", 0),
    ("pairs", "b_later = tl.where(m_first, 1.0, b_first", "b_later = tl.where(m_first, 1.0, b_second", 0),
    ("pairs", "b_earlier = tl.where(m_first, b_second", "b_earlier = tl.where(m_first, b_first", 0),
    ("pairs", "b_t // R > b_s // R", "b_t // R >= b_s // R", 0),
    ("pairs", "b_t // (2 * R) > b_s // (2 * R)", "b_t // (2 * R) >= b_s // (2 * R)", 0),
    ("pairs", "(i_c * H + i_h) * (C // R) + o_r // R", "(i_c * H + i_h) * (C // R)", 0),
    ("pairs", "(i_c * H + i_h) * (C // R) + o_r // R", "i_c * (C // R) + o_r // R", 0),
    ("pairs", "tl.where(load_fine(fine, i_c, i_h, H, o_r, C, R)[:, None], b_rise, 0.0)", "b_rise * 1.0", 0),
    ("pairs", "q + (o_m // C)[:, None] * K", "q", 0),
    ("pairs", "a + (o_m // C)[:, None] * C", "a + (o_m // C)[:, None]", 0),
    ("pairs", "o_t = o_m % C", "o_t = o_m", 0),
    ("pairs", "tl.trans(b_k * b_rise)", "tl.trans(b_k)", 0),
    ("pairs", "tl.exp2(b_high) * tl.exp2(b_low), ", "tl.exp2(b_high), ", 0),
    ("pairs", "b_k * b_near * tl.exp2(-HALF)", "b_k * b_near", 0),
    ("pairs", "b_to * stacked(b_later, HEADS)", "b_to", 0),
    ("pairs", "b_part = tl.where(m_far, b_far, b_part)", "b_part = b_part * 1.0", 0),
    ("pairs", "b_part = tl.where(m_run, dot", "b_part = tl.where(m_own, dot", 0),
    ("pairs", "m_a = m_t[:, None] & (o_t[:, None] >= o_r[None, :])", "m_a = o_t[:, None] >= o_r[None, :]", 0),
    ("pairs", "n_r = i_b * R, tl.minimum(n - i_b * R, R)", "n_r = i_b * R, tl.minimum(n, R)", 0),
    ("pairs", "+ i_b) == 0", "+ i_b) != 0", 0),
    ("pairs", "+ i_b) == 0", "+ i_b) != 0", 1),
    ("pairs", "tl.cdiv(n, R)", "n // R", 0),
    ("pairs", "tl.cdiv(n, R)", "n // R", 1),
    ("pairs", "b_sum += tl.where(o_r[:, None] >= s", "b_sum += tl.where(o_r[:, None] > s", 0),
    ("pairs", "b_sum += tl.where(o_r[:, None] >= s", "b_sum += tl.where(o_r[:, None] > s", 1),
    ("pairs", "s = R - 1 - i", "s = i", 0),
    ("pairs", "i_first + o_r), b_own", "o_r), b_own", 0),
    ("pairs", "b_a * head_scale(scale, i_q % G, G, STRICT)", "b_a", 0),
    ("pairs", "b_a *= load_pairs(e", "b_a += 0.0 * load_pairs(e", 0),
    ("pairs", "m_own & m_other", "m_own", 0),
    ("pairs", "m_own_turned & m_other", "m_own_turned", 0),
    ("pairs", "b_to, PRECISION) * b_rise", "b_to, PRECISION)", 0),
    ("pairs", "tl.where(m_run, b_a, 0.0), b_k * b_from", "tl.where(m_run, b_a, 0.0), b_k * b_rise", 0),
    ("pairs", "b_to, PRECISION) * b_from", "b_to, PRECISION)", 0),
    ("pairs", "b_k * b_from * b_earlier, PRECISION) * b_later", "b_k * b_from * b_earlier, PRECISION)", 0),
    ("pairs", "b_part * (b_from * b_earlier)", "b_part * b_from", 0),
    ("tiles", "(o_r[:, None] <= o_r[None, :]) & (o_r < n)[None, :]", "(o_r < n)[None, :]", 0),
    ("tiles", "* HQ + i_h)[None, :] * C + o_r[:, None]", "* HQ + i_h)[None, :] * C", 0),
    ("pairs", "b_dq *= b_fall", "b_dq *= 1.0", 0),
    ("pairs", "mask=m_r & (o_r > s), other=0.0)", "mask=m_r & (o_r >= s), other=0.0)", 0),
    ("pairs", "tl.where(o_r[:, None] < t", "tl.where(o_r[:, None] <= t", 0),
    ("pairs", "mask=(o_r < t) & (o_r * 0 + t < n_r)", "mask=(o_r <= t) & (o_r * 0 + t < n_r)", 0),
    ("gradients", "tl.trans(b_dh), PRECISION)", "tl.trans(b_dh), PRECISION) * scale", 0),
    ("gradients", "b_dk *= load_rows(behind", "b_dk *= load_rows(to", 0),
    ("gradients", "b_dg = tl.cumsum(b_part, 0) - b_part", "b_dg = tl.cumsum(b_part, 0)", 0),
    ("gradients", "b_straddle * b_whole", "b_straddle", 0),
    ("gradients", "b_dq *= head_scale(", "b_dq += 0.0 * head_scale(", 0),
    ("gradients", "            b_dq *= b_to\n", "            b_dq *= 1.0\n", 0),
    ("gradients", "b_same[:, None] * b_q", "b_q", 0),
    ("gradients", "b_pairs = -(b_k * b_own)", "b_pairs = b_k * b_own", 0),
    ("gradients", "b_both += b_a * dot", "b_both = b_a * dot", 0),
    ("gradients", "tl.where(o_r[:, None] >= o_r[None, :], b_before, 0.0)", "b_before", 0),
    ("gradients", "tl.cumsum(b_both, 1) - b_both", "tl.cumsum(b_both, 1)", 0),
    ("gradients", "tl.cumsum(b_pairs, 0, reverse=True)", "tl.cumsum(b_pairs, 0)", 0),
    ("gradients", "b_a = tl.where(o_r[:, None] > o_r[None, :], b_a, 0.0)", "b_a = b_a * 1.0", 0),
    ("gradients", "i_k.to(tl.int64) * S", "i_k.to(tl.int64)", 0),
    (
        "gradients",
        "m_h = (o_k < K)[:, None] & (o_v < V)[None, :]",
        "m_h = (o_k < K)[:, None] & (o_v < V + 1)[None, :]",
        0,
    ),
    ("states", "b_total *= b_decay", "b_total = b_decay", 0),
    ("states", "tl.full((BG,), 1.0", "tl.full((BG,), 0.0", 0),
    ("states", "o_g + i_other * KG < KG", "o_g < KG", 0),
    ("states", "o_g + i_other * KG < KG", "o_g + i_other * KG < KG + 1", 0),
    ("states", "total + i_nh * KG", "total + i_n * KG", 0),
    ("states", "n_m - 1 - i if REVERSE", "i if REVERSE", 0),
    ("states", "start + i_mh * K * V", "start + i_nh * K * V", 0),
    ("states", "total + i_mh * KG", "total + i_nh * KG", 0),
    ("states", "mask=o_g < KG, other=0.0)[:, None]", "mask=o_g < KG + 1, other=0.0)[:, None]", 0),
    ("states", "part + i_mh * K * V + o_h, mask=m_h, other=0.0", "part + i_mh * K * V + o_h", 0),
    ("states", "tl.load(pieces + i_n * 2)", "tl.load(pieces + i_n * 3)", 0),
    ("states", "i_n, i_h = i_nh // H, i_nh % H", "i_n, i_h = i_nh // H, i_nh // H", 1),
    ("recurrent", "i_nh // H, i_nh % H", "i_nh // H, i_nh // H", 0),
    ("recurrent", "i_v * BV + tl.arange(0, BV)", "tl.arange(0, BV)", 0),
    ("recurrent", "m_k, m_v = o_k < K, o_v < V", "m_k, m_v = o_k <= K, o_v < V", 0),
    ("recurrent", "m_k, m_v = o_k < K, o_v < V", "m_k, m_v = o_k < K, o_v <= V", 0),
    ("recurrent", "& (o_k[:, None] * 0 + i_s >= 0)", "", 0),
    ("recurrent", "(i_s * H + i_h) * K * V", "(i_n * H + i_h) * K * V", 0),
    ("recurrent", "i_row = i_n * T * H + i_h", "i_row = i_n * H + i_h", 0),
    ("recurrent", "mask=m_h, other=0.0)", "mask=m_h)", 0),
    ("recurrent", "mask=o_g < KG, other=0.0", "other=0.0", 0),
    ("recurrent", "g + i_row * KG", "g + i_row * K", 0),
    ("recurrent", "p_v + H * V", "p_v + H * K", 0),
    ("recurrent", "p_q + i_g * K", "p_q", 0),
    ("recurrent", "b_old if BEFORE", "b_h if BEFORE", 0),
    ("recurrent", "gv + i_row * V", "gv + i_row * K", 0),
    ("recurrent", "tl.load(p_gv, mask=m_v, other=0.0)", "tl.load(p_gv)", 0),
    ("recurrent", "p_gv + H * V", "p_gv + H", 0),
    (
        "recurrent",
        "tl.where(i_s >= 0, tl.sum(b_read * b_q[:, None], 0) * scale, 0.0)",
        "tl.sum(b_read * b_q[:, None], 0) * scale",
        0,
    ),
    ("recurrent", "tl.sum(b_read * b_q[:, None], 0) * scale", "tl.sum(b_read * b_q[:, None], 0)", 0),
    ("recurrent", "p_beta + H", "p_beta + 1", 0),
    ("recurrent", "b_v - tl.sum(b_h * b_k[:, None], 0)", "b_v - tl.sum(b_old * b_k[:, None], 0)", 0),
    ("recurrent", "tl.load(p_beta).to(tl.float32) * ", "", 0),
    ("tiles", "i_g < G - 1, scale, 1.0", "i_g < G, scale, 1.0", 0),
    ("outputs", "| (i_g < G - 1)", "| (i_g < G)", 0),
    ("outputs", "o_r[:, None] < o_r[None, :]) | (i_g", "o_r[:, None] <= o_r[None, :]) | (i_g", 0),
    ("outputs", "0 if ALONE else n_k", "n_k", 0),
    ("gradients", "b_same = tl.where(i_g < G - 1, b_same, 0.0)", "b_same = b_same * 1.0", 0),
    ("gradients", "b_dk += tl.where(i_g < G - 1, 0.0, b_dq)", "b_dk += 0.0 * b_dq", 0),
    ("gradients", "b_dk += tl.where(i_g < G - 1, 0.0, b_dq)", "b_dk += b_dq", 0),
    ("gradients", "tl.where((o_r < n - 1)[:, None], b_k * b_dk, 0.0)", "b_k * b_dk", 0),
    ("gradients", "o_r < n - 1", "o_r < n - 2", 0),
    ("corrections", "(i_t + o_r) * H + i_h, mask=m_r, other=0.0", "(i_t + o_r) * H + i_h, mask=m_r", 0),
    ("corrections", "(i_t + o_r) * H + i_h, mask=m_r, other=0.0", "(i_t + o_r) * H + i_h", 0),
    ("corrections", "(i_t + o_r) * H + i_h", "(i_t + o_r) * H", 0),
    ("corrections", "(i_t + o_r) * H + i_h", "i_t + o_r + i_h", 0),
    ("corrections", "tl.where(m_same, -b_a, 0.0)", "tl.where(m_same, b_a, 0.0)", 0),
    ("corrections", "tl.range(2, 16)", "tl.range(3, 16)", 0),
    ("corrections", "tl.range(2, 16)", "tl.range(2, 15)", 0),
    (
        "corrections",
        "b_row += tl.sum(b_row[:, :, None] * b_d, 1)",
        "b_row += 0.0 * tl.sum(b_row[:, :, None] * b_d, 1)",
        0,
    ),
    ("corrections", "tl.where(m_same, b_d, 0.0)", "b_d", 0),
    ("corrections", "-dot(b_d, tl.where(m_same, 0.0, b_a), PRECISION)", "-dot(b_d, b_a, PRECISION)", 0),
    ("corrections", "-dot(b_d, tl.where", "dot(b_d, tl.where", 0),
    ("corrections", "b_d += dot(b_n, b_d, PRECISION)", "b_d += dot(b_d, b_n, PRECISION)", 0),
    ("corrections", "m_r = o_r < n\n    kind", "m_r = o_r <= n\n    kind", 0),
    ("corrections", "i_k * BK + tl.arange(0, BK), m_r)", "tl.arange(0, BK), m_r)", 0),
    ("corrections", "o_r, m_r)[None, :]\n", "o_r, m_r)[:, None]\n", 0),
    ("corrections", "o_r[:, None] > o_r[None, :], b_a, 0.0", "o_r[:, None] >= o_r[None, :], b_a, 0.0", 0),
    ("corrections", "b_a *= between(", "b_a += 0.0 * between(", 0),
    ("corrections", "m_m = m_r[:, None] & (o_r[:, None] >= o_r[None, :])", "m_m = o_r[:, None] >= o_r[None, :]", 0),
    ("corrections", "load_pairs(m, i_t, i_h, H, o_r, n, C)", "load_pairs(m, i_t, i_h, H, o_r, C, C)", 0),
    ("corrections", "load_pairs_turned(m, i_t", "load_pairs(m, i_t", 0),
    (
        "corrections",
        "load_weights(beta, i_t, i_h, H, o_r, m_r)[:, None]\n        if DECAYED",
        "1.0\n        if DECAYED",
        0,
    ),
    ("corrections", "b_x *= load_rows(behind", "b_x += 0.0 * load_rows(behind", 0),
    ("corrections", "b_x = b_x * load_rows(to", "b_x = b_x + 0.0 * load_rows(to", 0),
    ("corrections", "PRECISION) * sign", "PRECISION)", 0),
    ("corrections", "o_n == i_k)[:, None, None], b_h, 0.0", "o_n >= i_k)[:, None, None], b_h, 0.0", 0),
    ("corrections", "o_n == i_k)[:, None, None], b_part", "o_n >= i_k)[:, None, None], b_part", 0),
    ("corrections", "i_nh // H, i_nh % H", "i_nh // H, i_nh // H", 0),
    ("corrections", "i_v * BV + tl.arange(0, BV)", "tl.arange(0, BV)", 0),
    ("corrections", "[:, None, None] * BK + tl.arange(0, BK)", "[:, None, None] + tl.arange(0, BK)", 0),
    ("corrections", "o_all * V + o_v", "o_all * K + o_v", 0),
    ("corrections", "(o_all < K) & (o_v < V)", "(o_all <= K) & (o_v < V)", 0),
    ("corrections", "(o_all < K) & (o_v < V)", "(o_all < K) & (o_v <= V)", 0),
    ("corrections", "tl.load(first + i_nh * K * V", "0.0 * tl.load(first + i_nh * K * V", 0),
    ("corrections", "tl.cdiv(i_end - i_begin, C)", "(i_end - i_begin) // C", 0),
    ("corrections", "n_c - 1 - i if REVERSE else i", "i", 0),
    ("corrections", "n = tl.minimum(i_end - i_t, C)", "n = C", 0),
    ("corrections", "(i_first + i_c) * H + i_h", "i_c * H + i_h", 0),
    ("corrections", "b_e -= dot(", "b_e += dot(", 0),
    ("corrections", "b_e *= load_weights(", "b_e += 0.0 * load_weights(", 0),
    ("corrections", "        if not REVERSE:", "        if True:", 0),
    ("corrections", "b_part *= tl.load(p_last", "b_part += 0.0 * tl.load(p_last", 0),
    ("corrections", "to if REVERSE else behind", "behind if REVERSE else to", 0),
    ("corrections", "b_k = b_k * b_w", "b_k = b_k * 1.0", 0),
    ("corrections", "b_q = b_q * b_w", "b_q = b_q * 1.0", 0),
    ("corrections", "dot(tl.trans(b_q), b_do, PRECISION) * scale", "dot(tl.trans(b_q), b_do, PRECISION)", 0),
    ("corrections", "i_h * G + i_g, H * G, V", "i_h * G, H * G, V", 0),
]


def load(root: Path, name: str, mutant: tuple | None):
    """A copy of the kernels under another package name, with the fault in it."""
    shutil.copytree(SOURCE, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (root / name).glob("*.py"):
        text = path.read_text().replace("liger_ops._triton", name)
        if mutant is not None and path.stem == mutant[0]:
            _, old, new, place = mutant
            parts = text.split(old)
            assert len(parts) > place + 1, f"{path.name} no longer says {old!r}"
            text = old.join(parts[: place + 1]) + new + old.join(parts[place + 1 :])
        path.write_text(text)
    return {module: importlib.import_module(f"{name}.{module}") for module in ("additive", "delta", "recurrent")}


def killed(modules, kernels: str) -> bool:
    """Whether any clean case that runs the kernels of a file, or any if unnamed, faults or misses its bar."""
    if kernels not in ("corrections", "recurrent") and missed(partial(run, modules["additive"]), exact, CLEAN, BARS):
        return True
    erase = test_delta
    if kernels != "recurrent" and missed(partial(erase.run, modules["delta"]), erase.exact, erase.CLEAN, erase.BARS):
        return True
    return kernels in ("", "recurrent") and not steps_are_right(modules["recurrent"])


def missed(found, true, cases, bars) -> bool:
    for case in cases:
        torch.manual_seed(0)
        x = case.tensors()
        try:
            with sanitized():
                far = distances(found(case, x), true(case, x))
        except Exception:
            return True
        if any(d > bars[n] for n, d in far.items()):
            return True
    return False


def steps_are_right(op) -> bool:
    """Three tokens on a pool, one request of which has no state, beside the naive recurrence."""
    N, T, H, HQ, K, V = 3, 3, 2, 4, 20, 24
    q, k, v = torch.randn(N, T, HQ, K), torch.randn(N, T, H, K), torch.randn(N, T, H, V)
    slots, start = torch.tensor([4, -1, 0]), torch.randn(6, H, K, V)
    by_channel, by_value = -torch.rand(N, T, H, K), -torch.rand(N, T, H, V)
    cases = (None, None), (-torch.rand(N, T, H), None), (by_channel, None), (by_channel, by_value)
    n, beta = slots >= 0, 0.1 * torch.rand(N, T, H)
    for (g, gv), before, erases in itertools.product(cases, (False, True), (False, True)):
        if erases and (before or gv is not None):
            continue
        pool = start.clone()
        try:
            with sanitized():
                o = op.forward(q, k, v, g, gv, pool, pool, slots, 0.3, before, beta if erases else None)
        except Exception:
            return False
        *parts, of_values = (x if x is None else x[n].double() for x in (q, k, v, g, gv))
        state = start[slots[n]].double()
        if erases:
            wanted, last = naive_delta_rule(*parts[:3], beta[n].double(), parts[3], 0.3, state)
        else:
            wanted, last = naive_recurrence(*parts, 0.3, state, gv=of_values)
        if before:
            # Token t reads what token t - 1 left behind.
            reads = [naive_recurrence(*_first(t, *parts), 1.0, state, gv=_first(t, of_values)[0])[1] for t in range(T)]
            grouped = parts[0].unflatten(2, (H, -1))
            wanted = torch.stack([0.3 * (grouped[:, t] @ h).flatten(1, 2) for t, h in enumerate(reads)], 1)
        twin = start.double()
        twin[slots[n]] = last
        near = distances({"o": o[n], "pool": pool}, {"o": wanted, "pool": twin})
        if max(near.values()) > 1e-6 or o[~n].any():
            return False
    return True


def _first(t: int, *tensors):
    return [x if x is None else x[:, :t] for x in tensors]


def survives(n: int, mutant: tuple | None, root: Path) -> bool:
    """In a process of its own kind, which imports its own copies."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(root))
    return not killed(load(root, f"mutant_{n}", mutant), mutant[0] if mutant else "")


def test_mutants_are_killed(tmp_path):
    """And the original is not: whatever else could go wrong in those processes would look like a kill."""
    mutants = [None, *MUTANTS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(survives, range(len(mutants)), mutants, [tmp_path] * len(mutants)))
    assert found[0]
    alive = [mutant for mutant, survived in zip(MUTANTS, found[1:], strict=True) if survived]
    print(f"{len(alive)} of {len(MUTANTS)} mutants alive: {alive}")
    assert len(alive) <= 0.05 * len(MUTANTS), alive


@pytest.mark.parametrize("case", [Case(gate="channel"), Case(gate="head")])
def test_a_clean_kernel_is_left_alone(case):
    assert len(MUTANTS) >= 170
    with sanitized():
        run(liger_ops._triton.additive, case, case.tensors())
