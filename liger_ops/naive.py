"""The gated linear recurrence, one token at a time: the equations every other form is checked against.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import heapq
import itertools

import torch


def naive_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    normalize: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(g_t) h_{t-1} exp(gv_t) + k_t v_t^T and o_t = scale q_t h_t (Liger, arXiv 2503.01496, eq. 1-3).

    q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], any floating dtype, computed in that dtype. g is a log decay <= 0:
    [B,T,H,K] per channel, [B,T,H] per head, [H] fixed, None for no decay; gv [B,T,H,V] likewise. With normalize,
    o_t is divided by q_t z_t unless that is 0, where z_t is the same recurrence with every value equal to 1, and the
    state carries z as a last column. Returns o [B,T,HQ,V] and the final state [N,H,K,V] (V + 1 with normalize); N is
    B, or the number of sequences that cu_seqlens [N+1] packs into batch 1.
    """
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    B, T, HQ, K = q.shape
    H, V = v.shape[-2:]
    scale = float(K**-0.5) if scale is None else scale
    if g is None:
        decay = q.new_ones(1, 1, 1, 1).expand(B, T, H, 1)
    elif g.ndim == 1:
        decay = g.exp().view(1, 1, H, 1).expand(B, T, H, 1)
    else:
        decay = g.exp() if g.ndim == 4 else g.exp()[..., None]
    keep = q.new_ones(1, 1, 1, 1).expand(B, T, H, 1) if gv is None else gv.exp()
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()

    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        h = q.new_zeros(B, H, K, V) if initial_state is None else initial_state[rows].to(q.dtype)
        for t in range(start, end):
            h = decay[:, t, :, :, None] * h * keep[:, t, :, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(scale * torch.einsum("bhgk,bhkv->bhgv", q[:, t].view(B, H, HQ // H, K), h).flatten(1, 2))
        states.append(h)
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HQ, V)
    if normalize:
        o = o[..., :-1] / torch.where(o[..., -1:] == 0, 1, o[..., -1:])
    return o, torch.cat(states) if states else q.new_zeros(0, H, K, V)


def naive_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) h_{t-1} + beta_t k_t v_t^T, o_t = scale q_t h_t.

    DeltaNet (arXiv 2406.06484, eq. 3) without g, the gated delta rule (arXiv 2412.06464, eq. 10) with g [B,T,H], Kimi
    Delta Attention (arXiv 2510.26692, eq. 1) with g [B,T,H,K]. q [B,T,HQ,K] and k [B,T,HK,K]; v [B,T,H,V], beta
    [B,T,H] and the state [N,H,K,V] have H heads, a multiple of HK. HQ is a multiple of H, or H one of HQ. Returns o
    [B,T,max(HQ,H),V] and the final state.
    """
    (B, T, HQ, K), (H, V) = q.shape, v.shape[-2:]
    scale = float(K**-0.5) if scale is None else scale
    k = k.repeat_interleave(H // k.shape[2], 2)
    q = q.repeat_interleave(max(1, H // HQ), 2).unflatten(2, (H, -1))
    g = q.new_zeros(B, T, H, 1) if g is None else g
    decay = g.exp() if g.ndim == 4 else g.exp()[..., None]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()

    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        h = q.new_zeros(B, H, K, V) if initial_state is None else initial_state[rows].to(q.dtype)
        for t in range(start, end):
            h = decay[:, t, :, :, None] * h
            error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], h)
            h = h + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
            outputs.append(scale * torch.einsum("bhgk,bhkv->bhgv", q[:, t], h).flatten(1, 2))
        states.append(h)
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, max(HQ, H), V)
    return o, torch.cat(states) if states else q.new_zeros(0, H, K, V)


def naive_rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o_t = scale r_t (h_{t-1} + diag(u) k_t v_t^T), then h_t = diag(exp(w_t)) h_{t-1} + k_t v_t^T (arXiv 2404.05892).

    r [B,T,HQ,K], k and w [B,T,H,K], v [B,T,H,V], u [HQ,K] -> o [B,T,HQ,V], state [B,H,K,V].
    """
    (B, T, HQ, K), (H, V) = r.shape, v.shape[2:]
    G, scale = HQ // H, float(K**-0.5) if scale is None else scale
    h, outputs = r.new_zeros(B, H, K, V) if initial_state is None else initial_state.to(r.dtype), []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        seen = h.unsqueeze(2) + u.view(H, G, K, 1) * kv.unsqueeze(2)
        outputs.append(scale * torch.einsum("bhgk,bhgkv->bhgv", r[:, t].view(B, H, G, K), seen).flatten(1, 2))
        h = w[:, t, :, :, None].exp() * h + kv
    return torch.stack(outputs, 1) if outputs else r.new_zeros(B, 0, HQ, V), h


def naive_gsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """hk_t = hk_{t-1} diag(exp(g_t)) + k_t s_t^T, then hv by softmax(scale q_t hk_t) (arXiv 2409.07146, eq. 10).

    q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], s and g [B,T,H,M] -> o [B,T,HQ,V], (hk [B,H,K,M], hv [B,H,M,V]). Without g,
    s_t enters with weight exp(s_t) and all weights of a slot are divided by their sum so far (arXiv 2110.02488).
    """
    if g is None:
        z = s.logcumsumexp(1)
        g = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
        s = (s - z).exp()
    hk, hv = (None, None) if initial_state is None else initial_state
    slots, hk = naive_recurrence(q, k, s, None, scale, hk, gv=g)
    o, hv = naive_recurrence(slots.softmax(-1), s, v, g, 1.0, hv)
    return o, (hk, hv)


def naive_lightnet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """h_t = (exp(z_{t-1}) h_{t-1} + exp(k_t) v_t^T) / exp(z_t), exp(z_t) = exp(z_{t-1}) + exp(k_t) (arXiv 2405.21022).

    q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], initial_state (h [B,H,K,V], z [B,1,H,K]) -> o [B,T,HQ,V], scale q_t h_t, and
    the final (h, z).
    """
    (B, T, HQ, K), (H, V) = q.shape, v.shape[2:]
    scale, weights, outputs = float(K**-0.5) if scale is None else scale, k.exp(), []
    h, z = (q.new_zeros(B, H, K, V), q.new_full((B, 1, H, K), -torch.inf)) if initial_state is None else initial_state
    total = z.squeeze(1).exp()
    for t in range(T):
        written = weights[:, t, :, :, None] * v[:, t, :, None, :]
        h, total = total.unsqueeze(-1) * h + written, total + weights[:, t]
        h = h / total.unsqueeze(-1)
        outputs.append(scale * torch.einsum("bhgk,bhkv->bhgv", q[:, t].view(B, H, HQ // H, K), h).flatten(1, 2))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HQ, V), (h, total.log().unsqueeze(1))


def naive_mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T, n_t likewise with values 1, o_t = q_t C_t / max(|q_t n_t|, 1).

    q [B,T,HQ,K] times scale, k [B,T,H,K], v [B,T,H,V], i and f [B,T,H], initial_state (C, n, m) standing for exp(m) C
    and exp(m) n -> o [B,T,HQ,V] and the final C [B,H,K,V], n [B,H,K] in plain units, which is where this overflows and
    a stabilised form does not (arXiv 2405.04517, eq. 19-27).
    """
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = None
    if initial_state is not None:
        C, n, m = initial_state
        state = torch.cat([C, n.unsqueeze(-1)], -1) * m.exp()[..., None, None]
    o, h = naive_recurrence(q, i.exp().unsqueeze(-1) * k, v, f, scale, state)
    return o[..., :-1] / o[..., -1:].abs().clamp(min=1.0), (h[..., :-1], h[..., -1])


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def naive_sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention where token i sees tokens i - window + 1 .. i and the first `sinks` tokens.

    Scores s are bounded to softcap tanh(s / softcap) if there is a softcap.

    q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V] -> [B,T,HQ,V].
    """
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (j <= i) & ((i - j < window) | (j < sinks))
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = _capped(torch.einsum("bihk,bjhk->bhij", q, k) * scale, softcap)
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def naive_recall(score: torch.Tensor, recall: int, *, window: int, sinks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stay exact beyond the window, by a heap for each head, one token at a time.

    Token j, unless a sink, leaves the window at step i = j + window. It is recalled from then on while fewer than
    `recall` of the tokens that have left have a higher score, or an equal one and came later.

    score [B,T,H] -> recalled [B,H,T,T], whether query i sees token j so, and lost [B,H,T], the token that is not, or no
    longer, recalled from step i on, -1 where all are that have left.
    """
    B, T, H = score.shape
    recalled, lost = torch.zeros(B, H, T, T, dtype=torch.bool), torch.full((B, H, T), -1)
    for b, h in itertools.product(range(B), range(H)):
        heap: list[tuple[float, int]] = []
        for i in range(window + sinks, T):
            token = (score[b, i - window, h].item(), i - window)
            if len(heap) < recall:
                heapq.heappush(heap, token)
            else:
                lost[b, h, i] = heapq.heappushpop(heap, token)[1]
            recalled[b, h, i, [j for _, j in heap]] = True
    return recalled, lost


def naive_liger_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None = None,
    mix: torch.Tensor | float = 1.0,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    recall: int = 0,
    score: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax, exact over the last `window` and the first `sinks` tokens, a recurrence over features for the rest.

    o_i = (sum_near exp(s_ij) v_j + mix exp(q_log_i) h_i) / (sum_near exp(s_ij) + mix exp(q_log_i) z_i), where token
    j = i - window enters [h, z] at step i: [h, z] = exp(g_j) [h, z] + exp(k_log_j) [v_j, 1]^T, unless it is a sink.
    With recall, the tokens that `naive_recall` finds by their score [B,T,H] are near too, and what it says is lost at
    step i enters then.

    q [B,T,HQ,D], k [B,T,H,D], v [B,T,H,V], q_log [B,T,HQ,M], k_log [B,T,H,M], g [B,T,H,M], [B,T,H] or None, mix a
    number or [HQ] -> [B,T,HQ,V] and the last [h, z], [B,H,M,V+1].
    """
    (B, T, HQ, D), (H, V), M = q.shape, v.shape[2:], q_log.shape[-1]
    G, scale = HQ // H, float(D**-0.5) if scale is None else scale
    gain = (mix if isinstance(mix, torch.Tensor) else q.new_tensor(mix)).expand(HQ).view(HQ, 1)
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    recalled, lost = naive_recall(q.new_zeros(B, T, H) if score is None else score, recall, window=window, sinks=sinks)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    near = recalled | ((j <= i) & ((i - j < window) | (j < sinks)))
    row, head = torch.arange(B)[:, None], torch.arange(H)
    h, outputs = q.new_zeros(B, H, M, V + 1), []
    for i in range(T):
        j = lost[:, :, i]
        decay = q.new_ones(1) if g is None else g[row, j, head].exp().view(B, H, -1, 1)
        entered = decay * h + k_log[row, j, head].exp().unsqueeze(-1) * ones[row, j, head].unsqueeze(-2)
        h = torch.where((j >= 0)[..., None, None], entered, h)
        s = _capped(torch.einsum("bhgd,bnhd->bhgn", q[:, i].view(B, H, G, D), k) * scale, softcap)
        s = s.masked_fill(~near[:, :, None, i], -torch.inf)
        o = torch.einsum("bhgn,bnhv->bhgv", s.exp(), ones).flatten(1, 2)
        o = o + gain * (q_log[:, i].exp().view(B, H, G, M) @ h).flatten(1, 2)
        outputs.append(o[..., :-1] / o[..., -1:])
    return torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HQ, V), h
