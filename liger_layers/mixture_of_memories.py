"""Mixture of Memories: every token writes into a few of several linear memories; and the mixer with a single one.

Shapes: B batch, T time, D documents, M memories (the shared one last), R memories per token, HQ query heads, H
key/value heads, K head width, V value width, E = B * T * R entries, N sequences, C taps of the convolution.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from liger_layers._arguments import check_input, check_sizes
from liger_layers._routing import (
    Dispatch,
    OneToken,
    Routing,
    check_router_mask,
    choose,
    dispatch,
    memory_load,
    one_token,
)
from liger_layers._state import MemoryState, Origin
from liger_layers.patterns import MEMORIES
from liger_layers.recurrences import Sizes, Tensors, UpdateRule, rule_named, with_rule
from liger_ops import errors


class ShortConvolution(nn.Module):
    """Depthwise causal convolution of packed sequences, weight [C,hidden], the current token's tap last."""

    def __init__(self, hidden_size: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, hidden_size).uniform_(-(taps**-0.5), taps**-0.5))

    def forward(
        self, x: torch.Tensor, before: torch.Tensor, cu_seqlens: torch.Tensor, late: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x [E,hidden] and the inputs before each sequence [N,C-1,hidden] -> y [E,hidden] and the last inputs.

        Between them, if late, the input before each [E,hidden], for which C must be 2 or more; None otherwise.
        """
        (N, past), taps = before.shape[:2], self.weight.unbind(0)
        shift = past * torch.arange(N + 1, device=x.device)
        # One line in which every sequence stands behind what came before it.
        starts = cu_seqlens.to(shift) + shift
        place = torch.arange(x.shape[0] + N * past, device=x.device)
        sequence = torch.searchsorted(starts[1:], place, right=True)
        offset = place - starts[sequence]
        old, new = sequence * past + offset, (N - sequence - 1) * past + place
        line = torch.cat([before.flatten(0, 1).to(x.dtype), x]).index_select(0, torch.where(offset < past, old, new))
        first, *others = (tap * line[i : i + x.shape[0] + (N - 1) * past] for i, tap in enumerate(taps))
        y = sum(others, first)
        own = torch.arange(x.shape[0], device=x.device)
        own = own + past * torch.searchsorted(cu_seqlens[1:].to(own), own, right=True)
        last = starts[1:, None] + torch.arange(-past, 0, device=x.device)
        previous = line.index_select(0, own + (past - 1)) if late else None
        return y.index_select(0, own), previous, line.index_select(0, last.flatten()).view_as(before)


class RuleParameters(nn.ParameterDict):
    """forward() gives them by name: called as a module, they are there, wherever they are kept."""

    # ParameterDict refuses to be called.
    __call__: Callable[[], dict[str, nn.Parameter]] = nn.Module.__call__

    def forward(self) -> dict[str, nn.Parameter]:
        # Not dict(self), which torch.compile cannot trace.
        return {name: self[name] for name in self}


class MixtureOfMemories(Routing):
    """Several linear memories behind a router (MoM, arXiv 2502.13685, eq. 5-13), one op call for all of them.

    A token reads and writes its top_k memories and the shared one, o = sum_m w_m o_m + o_shared, where w are the
    router's probabilities, renormalised; at top_k=1 they are 1, and only `load_balancing_loss` trains what routes. Each
    memory has its own key, value and gate projection; k_proj, v_proj and gate_proj hold all of them, memory by
    memory, the shared one last. Keys, values and queries read the hidden states through a short causal convolution
    and SiLU, and so do gates that keys are made of; router and other gates read them as they are, as in Gated DeltaNet
    (arXiv 2412.06464): how much a token writes is a matter of what it is. memories=0 is the shared memory alone.

    router_shift lets the router read a x_t + (1 - a) x_{t-1}, a = sigmoid(w x_t + b), with zeros before a sequence: a
    scalar form of the token shift of RWKV-6 (arXiv 2404.05892). A router that reads tokens as they are sends a value
    anywhere, for it knows nothing of the key before it; this one can learn a = 0 at values and 1 at keys, and then both
    go where the key goes. It starts at a = 0.12 for every token.

    forward(x [B,T,hidden]) returns (y [B,T,hidden], MemoryState); pass the state back to continue. mask [B,T] bool
    marks real tokens: padding may stand anywhere, writes nothing and yields 0. cu_seqlens [D+1] bounds documents packed
    along time (batch 1), each with memories of its own; then states have batch D. router_logits is a list that takes in
    the router's output [B*T,memories], which `load_balancing_loss` and `load` take.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: as in LigerAttention; states are kept per key/value head.
        memories, top_k: routed memories, and how many of them a token goes to.
        rule: name of an entry of RECURRENCES that has one.
        shared: whether one more memory takes every token.
        value_dim: width of a head's values, and so of its output; head_dim if None.
        conv_size: taps of the convolution; 0 or None for none.
        router_shift: whether the router reads tokens mixed with the ones before them; conv_size must be 2 or more.
        slots: width of a memory of rule "gsa".
        layer_idx, num_layers: place in the stack, for the decay of rule "lightning".

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """

    routers, whole = ("router", "router_gate"), ("router", "router_gate")

    @errors.lists_keywords
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        memories: int = MEMORIES,
        top_k: int = 2,
        rule: str = "gated_deltanet",
        shared: bool = True,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        conv_size: int | None = 4,
        router_shift: bool = False,
        slots: int = 32,
        layer_idx: int = 0,
        num_layers: int = 1,
    ):
        super().__init__()
        errors.check_known("rule", rule, with_rule())
        check_sizes(hidden_size, num_heads, num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        _check_memories(memories, top_k, shared, slots)
        _check_taps(conv_size, router_shift, memories)
        H, K, M = num_kv_heads or num_heads, head_dim or hidden_size // num_heads, memories + shared
        V = value_dim or K
        self.memories, self.top_k, self.shared, self.rule = memories, top_k if memories else 0, shared, rule
        self.sizes = Sizes(M, num_heads, H, K, V, slots, layer_idx, num_layers)
        self.router = nn.Linear(hidden_size, memories, bias=False) if memories else None
        self.router_gate = nn.Linear(hidden_size, 1) if router_shift else None
        self.convolution = ShortConvolution(hidden_size, conv_size) if conv_size else None
        self.q_proj = nn.Linear(hidden_size, num_heads * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, M * H * K, bias=False) if self.update.key else None
        self.v_proj = nn.Linear(hidden_size, M * H * V, bias=False)
        gates = M * H * sum(self.update.widths(self.sizes))
        self.gate_proj = nn.Linear(hidden_size, gates) if gates else None
        self.rule_parameters = RuleParameters({n: start(self.sizes) for n, start in self.update.parameters.items()})
        self.g_proj = nn.Linear(hidden_size, num_heads * V, bias=False)
        self.norm = nn.RMSNorm(V, eps=1e-5)
        self.o_proj = nn.Linear(num_heads * V, hidden_size, bias=False)
        self.reset_gates()

    @property
    def update(self) -> UpdateRule:
        """The rule in RECURRENCES, looked up by name: layers are pickled, functions are not."""
        return rule_named(self.rule)

    @property
    def origin(self) -> Origin:
        """What a state of another layer must not differ in."""
        return (("rule", self.rule), ("shared", self.shared), ("router_shift", self.router_gate is not None))

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Put gates where they start: the router's at 0.12 for every token, the rule's at its own bias."""
        if self.router_gate is not None:
            self.router_gate.weight.zero_()
            self.router_gate.bias.fill_(-2.0)
        if self.gate_proj is not None:
            bias, starts = self.gate_proj.bias, self.update.starts(self.sizes)
            bias.copy_(bias.new_tensor(starts).repeat(len(bias) // len(starts)))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MemoryState:
        """The state before the first token; dtype is that of the hidden states."""
        M, H = self.sizes.memories, self.sizes.heads
        held = torch.promote_types(dtype, torch.float32)
        shapes = self.update.state(self.sizes)
        memories = tuple(torch.zeros(batch, M, H, *shape, device=device, dtype=held) for shape in shapes)
        if self.convolution is None:
            return MemoryState(memories, None, origin=self.origin)
        taps, hidden = self.convolution.weight.shape
        inputs = torch.zeros(batch, taps - 1, hidden, device=device, dtype=dtype)
        return MemoryState(memories, inputs, origin=self.origin)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        state: MemoryState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        router_logits: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, MemoryState]:
        sequences = self._check(x, mask, state, cu_seqlens)
        if state is None:
            state = self.initial_state(sequences, x.device, x.dtype)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        h, previous, inputs = self._convolve(x, mask, state.inputs, cu_seqlens)
        weights, chosen = self._route(x, previous, router_logits)
        o, memories = self._recur(x, h, weights, chosen, mask, state.memories, cu_seqlens)
        gate = F.silu(self.g_proj(x)).view_as(o)
        y = self.o_proj((self.norm(o.to(x.dtype)) * gate).flatten(2))
        return y, MemoryState(memories, inputs, origin=state.origin)

    def load(self, router_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Router logits [tokens,memories] -> fraction of real tokens sent to each memory; a starved one shows 0.

        mask [B,T] or [tokens] marks real tokens.
        """
        if router_logits.ndim != 2 or router_logits.shape[-1] != self.memories:
            errors.fail("router_logits", f"[tokens, memories] = [tokens, {self.memories}]", tuple(router_logits.shape))
        check_router_mask(mask, len(router_logits))
        return memory_load(router_logits, self.top_k, mask)

    def _route(self, x, previous, router_logits) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights in float32 and memories of every token, both [B,T,R]; the shared memory comes last."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = torch.ones(*x.shape[:2], int(self.shared), device=x.device, dtype=dtype)
        chosen = torch.full(weights.shape, self.memories, device=x.device)
        if self.router is not None:
            if self.router_gate is not None:
                x = previous + self.router_gate(x).sigmoid() * (x - previous)
            routed = choose(self.router, x, self.top_k, router_logits)
            weights, chosen = torch.cat([routed[0], weights], -1), torch.cat([routed[1], chosen], -1)
        return weights, chosen

    def _convolve(self, x, mask, before, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x through convolution and SiLU and, for the router, one token late, [B,T,hidden]; what later tokens see."""
        if self.convolution is None:
            return x, None, None
        late = self.router_gate is not None
        if mask is None:
            B, T = x.shape[:2]
            bounds = T * torch.arange(B + 1, device=x.device) if cu_seqlens is None else cu_seqlens
            h, previous, inputs = self.convolution(x.flatten(0, 1), before, bounds, late)
            return F.silu(h).view_as(x), previous.view_as(x) if late else None, inputs
        # Padding may part the tokens of a sequence: they meet in a single memory.
        line = dispatch(torch.zeros_like(mask, dtype=torch.long).unsqueeze(-1), 1, mask, cu_seqlens)
        packed = line.gather(x).squeeze(0), line.before(before.unsqueeze(1)), line.cu_seqlens
        h, previous, inputs = self.convolution(*packed, late)
        whole = torch.ones_like(x[..., :1])
        previous = line.scatter(previous.unsqueeze(0), whole) if late else None
        return F.silu(line.scatter(h.unsqueeze(0), whole)), previous, line.after(before, inputs)

    def _recur(self, x, h, weights, chosen, mask, state, cu_seqlens):
        """Every memory over its tokens, and their weighted sum [B,T,HQ,V]; the state after them."""
        rule, (M, HQ, H, K, V, *_) = self.update, self.sizes
        alone = h.shape[1] == 1 and cu_seqlens is None
        own = one_token(chosen, M, mask) if alone else dispatch(chosen, M, mask, cu_seqlens)
        q = own.gather(self.q_proj(h).unflatten(-1, (HQ, K)))
        v = own.gather_chosen(self.v_proj(h).unflatten(-1, (M, H, V)))
        k = None if self.k_proj is None else own.gather_chosen(self.k_proj(h).unflatten(-1, (M, H, K)))
        parameters, before = self.rule_parameters(), tuple(own.before(s) for s in state)
        gates = self._gates(x if rule.key else h, own, parameters)
        told = q, k, v, gates, parameters, self.sizes
        o, last = rule.run(*told, state=before, cu_seqlens=own.cu_seqlens, max_seqlen=q.shape[1])
        return own.scatter(o, weights), tuple(own.after(*pair) for pair in zip(state, last, strict=True))

    def _gates(self, x: torch.Tensor, own: Dispatch | OneToken, parameters: Tensors) -> dict[str, torch.Tensor]:
        if self.gate_proj is None:
            return {}
        raw = self.gate_proj(x).unflatten(-1, (self.sizes.memories, self.sizes.heads, -1))
        gates = self.update.activate(raw, parameters, self.sizes)
        return {name: own.gather_chosen(g) for name, g in gates.items()}

    def _check(self, x, mask, state, cu_seqlens) -> int:
        """Check what was given; the number of sequences."""
        check_input(x, mask, self.q_proj.in_features)
        B, T = x.shape[:2]
        errors.check_cu_seqlens(cu_seqlens, B, T, longest=T)
        sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and not isinstance(state, MemoryState):
            errors.fail("state", "a MemoryState", type(state).__name__)
        if state is not None:
            state.check_origin(self.origin)
            wanted = self.initial_state(sequences, torch.device("meta"), x.dtype)
            shapes = [[None if x is None else x.shape for x in (*s.memories, s.inputs)] for s in (state, wanted)]
            if shapes[0] != shapes[1]:
                errors.fail("state", f"tensors of shapes {shapes[1]}", shapes[0])
            kinds = [[None if x is None else x.dtype for x in (*s.memories, s.inputs)] for s in (state, wanted)]
            if kinds[0] != kinds[1]:
                errors.fail("state", f"tensors of {kinds[1]}", kinds[0])
            if state.memories[0].device != x.device:
                errors.fail("state", f"one on {x.device}", f"one on {state.memories[0].device}")
        return sequences


class LinearMixer(MixtureOfMemories):
    """One linear memory and no router. Arguments as in MixtureOfMemories."""

    @errors.lists_keywords
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        rule: str = "gated_deltanet",
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        conv_size: int | None = 4,
        slots: int = 32,
        layer_idx: int = 0,
        num_layers: int = 1,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            memories=0,
            rule=rule,
            head_dim=head_dim,
            value_dim=value_dim,
            num_kv_heads=num_kv_heads,
            conv_size=conv_size,
            slots=slots,
            layer_idx=layer_idx,
            num_layers=num_layers,
        )


def _check_memories(memories, top_k, shared, slots):
    errors.check_positive("memories", memories, 0)
    errors.check_positive("slots", slots)
    errors.check_flag("shared", shared)
    if memories and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= memories):
        errors.fail("top_k", f"a number from 1 to memories = {memories}", top_k)
    if not memories and not shared:
        errors.fail("shared", "True when memories is 0", shared)


def _check_taps(conv_size, router_shift, memories):
    if conv_size is not None:
        errors.check_positive("conv_size", conv_size, 0)
    errors.check_flag("router_shift", router_shift)
    if router_shift and not memories:
        errors.fail("router_shift", "False when memories is 0", router_shift)
    # What the convolution keeps for later tokens is where the router finds the token before.
    if router_shift and (conv_size or 0) < 2:
        errors.fail("conv_size", "2 or more with router_shift", conv_size)
