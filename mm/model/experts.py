"""Modality experts: a token's modality picks its group, and inside a group tokens and experts find each other (MoMa).

                         ┌─ text ──▶ router ─▶ 4 experts, each takes its share of the pack's text tokens ─┐
    (T, D) ─by modality──┤                                                                                ├─▶ (T, D)
                         └─ image ─▶ router ─▶ 4 experts …                                                ┘

With *expert choice* every expert takes the tokens of its group that it scores highest, as many as the capacity says, so
a token may get several experts or none: y = Σ_j g_j · SwiGLU_j(x), g_j = sigmoid(x W)_j if expert j took x, else 0 (Lin
et al. 2024, arXiv 2407.21770, section 2.2). Tokens are compared within one pack, so the result depends neither on the
micro-batch nor on the number of processes. It does depend on the other documents of the pack and on later tokens:
*auxiliary routers* (section 2.4.1 there) decide causally in their place, and *token choice* is causal by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.bounds import Factor, Few
from mm.layers.layout import Layout
from mm.layers.noise import hashed, logistic
from mm.layers.norm import RMSNorm
from mm.layers.precision import wide
from mm.model.stream import Stream
from mm.sample import Modality

ALL = "all"
"""Name of the one group of experts that mixes the modalities."""

Router = Literal["expert_choice", "token_choice"]
Rank = Literal["score", "share"]
Gate = Literal["after_norm", "before_norm"]
Scope = Literal["pack", "batch"]
By = Literal["modality", "hash"]


@dataclass(frozen=True)
class Experts:
    """`experts:` of a decoder: what takes the place of its feed-forward.

    groups: experts of every modality, ``{text: 4, image: 4}``; or ``{all: 8}``, one group for all of them. The only
        expert of a group takes all of its tokens and needs no router
    router: `expert_choice`, or `token_choice`, where each token goes to the `top` experts with the highest softmax and
        is weighted with it (Fedus et al. 2021, section 2.1)
    capacity: experts a token gets on average, with expert choice
    top: experts a token gets, with token choice
    balance: factor of the loss that spreads tokens evenly, with token choice (Fedus et al. 2021, eq. 4)
    rank: by what experts, with expert choice, rank tokens: the `score` sigmoid(x W) of each for itself (MoMa), or its
        `share`, softmax(x W) over the experts of the group (Zhou et al. 2022, arXiv 2202.09368, eq. 1): then experts
        compete, and fewer tokens go without one. Weights are sigmoids in either case
    noise: with expert choice, experts choose by sigmoid(x W + logistic noise) while training; weights have no noise.
        Without it all experts come to take the same tokens, and most pass the layer by: docs/moma.md
    scope: what experts choose among: the `pack`, or the whole micro-batch (`batch`), and then the result depends on
        `micro_batch` and on the number of processes
    gate: where norms stand behind the feed-forward, whether a weight is multiplied before or after them. Before, as in
        the paper, the norm takes it out again for every token that got a single expert: docs/moma.md
    auxiliary: with auxiliary routers
    by: what picks a token's group: its `modality`; or a `hash` of its id, a control in which groups mean nothing
    """

    groups: dict[str, Few]
    router: Router = "expert_choice"
    capacity: Factor = 1.0
    top: Few = 1
    balance: Factor = 0.01
    rank: Rank = "score"
    noise: bool = True
    scope: Scope = "pack"
    gate: Gate = "after_norm"
    auxiliary: bool = False
    by: By = "modality"

    def __post_init__(self) -> None:
        for option, values in (("router", Router), ("rank", Rank), ("gate", Gate), ("scope", Scope), ("by", By)):
            if getattr(self, option) not in get_args(values):
                allowed = ", ".join(get_args(values))
                raise ValueError(f"experts.{option} is {getattr(self, option)!r}; allowed: {allowed}")
        modalities = [modality.label for modality in Modality]
        names = list(self.groups)
        if self.by == "modality" and names != [ALL] and (not names or set(names) - set(modalities)):
            raise ValueError(f"experts.groups has {names}; expected some of {', '.join(modalities)}, or only {ALL}")
        for name, count in self.groups.items():
            if count < 1:
                raise ValueError(f"experts.groups.{name} is {count}; expected at least 1")
        if self.router == "token_choice" and self.top > min(self.groups.values()):
            raise ValueError(
                f"experts.top is {self.top} and the smallest group has {min(self.groups.values())} experts"
            )
        if self.router == "token_choice" and self.auxiliary:
            raise ValueError("experts.auxiliary is for expert_choice; token_choice is causal by itself")

    @property
    def couples(self) -> bool:
        """Whether a token's output depends on the other tokens of its pack."""
        return self.router == "expert_choice" and max(self.groups.values()) > 1

    @property
    def active(self) -> float:
        """Experts that a token goes through on average.

        FLOPs are counted by it: wrongly for a group of one expert where `capacity` is not 1.
        """
        return self.capacity if self.router == "expert_choice" else float(self.top)

    def group_of(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """(T,) int8 number of every token's group, in the order of `groups`.

        Args:
            tokens: (T,) int64 ids.
            modality: (T,) int8; -1 for padding, which is in no group.

        Raises:
            ValueError: tokens of a modality that has no experts.
        """
        if self.by == "hash":
            return torch.where(modality < 0, modality, (hashed(tokens) % len(self.groups)).to(torch.int8))
        if ALL in self.groups:
            return modality.clamp(max=0)
        names = list(self.groups)
        numbers = [names.index(one.label) if one.label in names else None for one in Modality]
        missing = [number for number in modality.unique().tolist() if number >= 0 and numbers[number] is None]
        if missing:
            raise ValueError(
                f"the stream holds {Modality(missing[0]).label} tokens and experts.groups is {self.groups}: give "
                "that modality experts of its own"
            )
        table = torch.tensor([-1 if number is None else number for number in numbers] + [-1], dtype=torch.int8)
        return table[modality.long()]


class Members(NamedTuple):
    """The tokens of one group, and how many of them an expert takes; the same for every layer.

    index: (n,) int64 positions in the stream, ascending
    pack: (n,) int64 pack of each
    packs: P, how many there are
    cell: (n,) int64 cell of each in a block of (P, L), where a pack has a row
    longest: L, most members in a pack
    ranks: (R,) int64 cells of a (P, K) block of members by rank, those that are within their pack's capacity
    most: K, members that an expert takes from a pack at most
    """

    index: Tensor
    pack: Tensor
    packs: int
    cell: Tensor
    longest: int
    ranks: Tensor
    most: int


@torch.compiler.disable(reason="how many tokens there are differs in every batch")
def members(layout: Layout, group: int, experts: int, capacity: float, scope: str) -> Members:
    """The members of a group, where each of `experts` takes ``capacity / experts`` of them from every pack."""

    def find() -> Members:
        groups = torch.zeros(layout.tokens, dtype=torch.int8) if layout.groups is None else layout.groups
        index = (groups == group).nonzero().squeeze(1)
        packs = layout.pack_of_token[index]
        if scope == "batch":
            packs = torch.zeros_like(packs)
        counts = packs.bincount(minlength=1)
        longest = int(counts.max())
        place = torch.arange(len(index)) - (counts.cumsum(0) - counts)[packs]
        takes = taken(counts, experts, capacity)
        most = int(takes.max())
        ranks = (torch.arange(most) < takes[:, None]).flatten().nonzero().squeeze(1)
        index, packs, cell, ranks = (x.to(layout.device) for x in (index, packs, packs * longest + place, ranks))
        return Members(index, packs, len(counts), cell, longest, ranks, most)

    return layout.derive(("members", group, experts, capacity, scope), find)


def taken(members: Tensor, experts: int, capacity: float) -> Tensor:
    """(P,) int64 tokens that each expert takes of so many members: ⌊n · c / E⌋, at least one, at most all."""
    shares = (members * capacity / experts).floor().long()
    return shares.clamp(min=1).minimum(members)


def scores(hidden: Tensor, router: nn.Linear) -> Tensor:
    """(T, E) logits of a router, in float32 even where weights are bf16: rounding decides who is chosen."""
    return F.linear(wide(hidden), wide(router.weight))


class AuxiliaryRouter(nn.Module):
    """Whether each of E experts, or a layer, would have chosen a token, from that token alone.

    logits = SiLU(x W₁) W₂ with W₁ (D, D/2) (arXiv 2407.21770, section 2.4.1); chosen where they are positive.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width // 2, bias=False)
        self.outer = nn.Linear(width // 2, outputs, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, E) logits. No gradient flows into the model that is imitated."""
        return self.outer(F.silu(self.inner(hidden.detach())))

    def imitation(self, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, int]:
        """(Σ cross-entropy, Σ agreement, number) over the (n, E) bool choices that are to be imitated."""
        logits = wide(self(hidden))
        loss = F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="sum")
        return loss, ((logits.detach() > 0) == chosen).sum(), chosen.numel()


class ExpertGroup(nn.Module):
    """E experts for the tokens of one group, each a SwiGLU of the decoder's feed-forward width.

    The weights of all experts lie in one matrix below each other: `gate` and `up` (E·F, D), `down` (E·D, F), so that
    they are sharded evenly whatever E is.
    """

    def __init__(
        self, width: int, ffn: int, experts: int, options: Experts, layer: int, norm_eps: float | None
    ) -> None:
        super().__init__()
        self.experts = experts
        self.options = options
        self.layer = layer
        self.gate = nn.Linear(width, experts * ffn, bias=False)
        self.up = nn.Linear(width, experts * ffn, bias=False)
        self.down = nn.Linear(ffn, experts * width, bias=False)
        self.router = nn.Linear(width, experts, bias=False) if experts > 1 else None
        self.auxiliary = AuxiliaryRouter(width, experts) if experts > 1 and options.auxiliary else None
        self.norm = nn.Identity() if norm_eps is None else RMSNorm(width, norm_eps)

    def stacked(self) -> dict[str, int]:
        """By name of a parameter, how many matrices lie below each other in it, for optimizers that treat matrices."""
        return {f"{name}.weight": self.experts for name in ("gate", "up", "down")}

    def forward(self, hidden: Tensor, stream: Stream, group: int) -> tuple[Tensor, Tensor]:
        """(m,) positions in the stream, and the (m, D) that is to be added there."""
        found = members(stream.layout, group, self.experts, self.options.capacity, self.options.scope)
        if self.router is None:
            return found.index, self.norm(self._compute(hidden.index_select(0, found.index)[None]))[0]
        if self.options.router == "token_choice":
            return self._by_tokens(hidden, stream, found)
        if stream.routing == "auxiliary" and self.auxiliary is not None:
            return self._by_auxiliary(hidden, stream, found)
        return self._by_experts(hidden, stream, found)

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.router is not None
        return scores(hidden, self.router)

    def _by_experts(self, hidden: Tensor, stream: Stream, found: Members) -> tuple[Tensor, Tensor]:
        own = hidden.index_select(0, found.index)
        logits = self._logits(own)
        picked = self._pick(logits.detach(), stream, found)  # (E, R) members
        weights = logits.sigmoid().T.gather(1, picked)  # (E, R)
        inputs = own.index_select(0, picked.flatten()).unflatten(0, picked.shape)
        outputs = self.norm(self._compute(inputs)) * weights.to(own.dtype)[..., None]
        self._report_untaken(stream, own, picked.flatten())
        if self.auxiliary is not None:
            chosen = torch.zeros_like(logits, dtype=torch.bool).T.scatter(1, picked, True).T
            stream.reports.imitation.append(self.auxiliary.imitation(own, chosen))
        return found.index.index_select(0, picked.flatten()), outputs.flatten(0, 1)

    @torch.compiler.disable(reason="it is indices only, and their number differs in every batch")
    def _pick(self, logits: Tensor, stream: Stream, found: Members) -> Tensor:
        """(E, R) members that each expert takes: those of highest score in every pack."""
        if self.options.rank == "share":
            logits = logits.log_softmax(1)
        if self.options.noise and stream.draws:
            keys = stream.layout.keys.index_select(0, found.index)
            logits = logits + logistic(keys, self.experts, self.layer)
        cells = found.packs * found.longest
        block = logits.new_full((cells, self.experts), float("-inf")).index_copy(0, found.cell, logits)
        member = found.cell.new_zeros(cells)
        member = member.index_copy(0, found.cell, torch.arange(len(found.cell), device=member.device))
        ranked = block.view(found.packs, found.longest, self.experts).topk(found.most, dim=1).indices  # (P, K, E)
        starts = torch.arange(found.packs, device=ranked.device)[:, None, None] * found.longest
        cells = (ranked + starts).flatten(0, 1).index_select(0, found.ranks)  # (R, E)
        return member[cells].T.contiguous()

    def _by_auxiliary(self, hidden: Tensor, stream: Stream, found: Members) -> tuple[Tensor, Tensor]:
        assert self.auxiliary is not None
        own = hidden.index_select(0, found.index)
        chosen = self.auxiliary(own) > 0
        expert, member = chosen.T.nonzero().unbind(1)  # by expert, then by position
        weights = self._logits(own).sigmoid()[member, expert]
        outputs = self.norm(self._compute_each(own.index_select(0, member), expert))
        self._report_untaken(stream, own, member)
        return found.index[member], outputs * weights.to(own.dtype)[:, None]

    def _report_untaken(self, stream: Stream, own: Tensor, taken: Tensor) -> None:
        """Count the (n, D) tokens that are not among those that experts took."""
        if not self.training:
            untaken = torch.ones(len(own), dtype=torch.bool, device=own.device).index_fill(0, taken, False)
            stream.reports.untaken.append((untaken.sum(), len(own)))

    def _by_tokens(self, hidden: Tensor, stream: Stream, found: Members) -> tuple[Tensor, Tensor]:
        own = hidden.index_select(0, found.index)
        probabilities = self._logits(own).softmax(-1)
        weights, chosen = probabilities.topk(self.options.top, dim=-1)  # (n, top)
        order = chosen.flatten().argsort(stable=True)
        member = order // self.options.top
        outputs = self.norm(self._compute_each(own.index_select(0, member), chosen.flatten()[order]))
        if stream.draws:
            stream.reports.balance.append(
                self.options.balance * self._imbalance(probabilities, chosen, found.pack, found.packs)
            )
        return found.index[member], outputs * weights.flatten()[order].to(own.dtype)[:, None]

    def _imbalance(self, probabilities: Tensor, chosen: Tensor, pack: Tensor, packs: int) -> Tensor:
        """() Σ over packs of n · E · Σ_e f_e P_e, with f_e the share of the n tokens that chose expert e and P_e its
        mean probability (Fedus et al. 2021, eq. 4 to 6). It is n where all is even."""
        chose = F.one_hot(chosen, self.experts).sum(1).to(probabilities.dtype)
        in_pack = F.one_hot(pack, packs).to(probabilities.dtype)  # (n, P)
        tokens = in_pack.sum(0).clamp(min=1)
        products = (in_pack.T @ chose) * (in_pack.T @ probabilities) / self.options.top
        return self.experts * (products.sum(1) / tokens).sum()

    def _compute(self, inputs: Tensor) -> Tensor:
        """(E, R, D) outputs of every expert for its own (E, R, D) tokens."""
        gate, up, down = (module.weight.unflatten(0, (self.experts, -1)) for module in (self.gate, self.up, self.down))
        inner = F.silu(inputs @ gate.mT) * (inputs @ up.mT)
        return inner @ down.mT

    def _compute_each(self, inputs: Tensor, expert: Tensor) -> Tensor:
        """(m, D) outputs for (m, D) tokens, each of the expert in (m,), which ascend."""
        counts = expert.bincount(minlength=self.experts)
        gate, up, down = (module.weight.unflatten(0, (self.experts, -1)) for module in (self.gate, self.up, self.down))
        if inputs.is_cuda and inputs.dtype == torch.bfloat16 and len(inputs):
            ends = counts.cumsum(0).int()
            inner = F.silu(F.grouped_mm(inputs, gate.mT, offs=ends)) * F.grouped_mm(inputs, up.mT, offs=ends)
            return F.grouped_mm(inner, down.mT, offs=ends)
        parts = inputs.split(counts.tolist())
        return torch.cat(
            [(F.silu(x @ g.T) * (x @ u.T)) @ d.T for x, g, u, d in zip(parts, gate, up, down, strict=True)]
        )


class ModalityExperts(nn.Module):
    """The groups of experts of a layer, called as a feed-forward is."""

    def __init__(self, width: int, ffn: int, options: Experts, layer: int, norm_eps: float | None = None) -> None:
        """
        Args:
            norm_eps: of a norm behind every expert, before its weight; None: there is none.
        """
        super().__init__()
        self.groups = nn.ModuleDict(
            {
                name: ExpertGroup(width, ffn, experts, options, layer, norm_eps)
                for name, experts in options.groups.items()
            }
        )

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        """(T, D); zero for a token that no expert took, so that it passes the layer as it is."""
        added = [group(hidden, stream, number) for number, group in enumerate(self.groups.values())]
        positions = torch.cat([places for places, _ in added])
        return torch.zeros_like(hidden).index_add(0, positions, torch.cat([values for _, values in added]))


class Untied(nn.Module):
    """A layer with weights of their own for every group (Liang et al. 2024, Mixture-of-Transformers, eq. 5).

    Called as ``(hidden, stream)``; each token goes through the part of its group, and padding through the first.
    """

    def __init__(self, make: Callable[[], nn.Module], groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = nn.ModuleDict({name: make() for name in groups})

    @torch.compiler.disable(reason="how many tokens each part gets differs in every batch")
    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        order, back, sizes = self._sorted(stream.layout)
        parts = hidden.index_select(0, order).split(sizes)
        outputs = [layer(part) for layer, part in zip(self.groups.values(), parts, strict=True)]
        return torch.cat(outputs).index_select(0, back)

    def _sorted(self, layout: Layout) -> tuple[Tensor, Tensor, list[int]]:
        """(T,) tokens by group, (T,) where each of the stream is among them, and the number in each group."""

        def sort() -> tuple[Tensor, Tensor, list[int]]:
            groups = torch.zeros(layout.tokens, dtype=torch.int8) if layout.groups is None else layout.groups
            groups = groups.clamp(min=0).long()
            order = groups.argsort(stable=True)
            sizes = groups.bincount(minlength=len(self.groups)).tolist()
            return order.to(layout.device), order.argsort().to(layout.device), sizes

        return layout.derive("sorted by group", sort)
