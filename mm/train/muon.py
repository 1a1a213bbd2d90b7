"""Muon for the matrices of blocks, AdamW for everything else: one optimizer, with one state by parameter.

    gradient ─momentum─▶ update = U S Vᵀ ─Newton–Schulz─▶ about U Vᵀ ─× 0.2 √max(m, n)─▶ weight

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; scaled as in Liu et al. 2025 (Muon is scalable for LLM
training), section 2.2, so that an update has the root mean square of AdamW's and the learning rate and decay that were
found for AdamW hold for the matrices too.

Newton–Schulz needs whole matrices. N processes that hold shards of them take N matrices at a time: one all-to-all makes
each of the processes owner of a whole one, another returns the shards. What is computed is what a single process
computes, and it is divided among them. (`torch.optim.Muon` of torch 2.11 takes sharded matrices and gives some of them
another update than on one process, by a third of its norm: docs/optim.md.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x ↦ a·x + b·x³ + c·x⁵, by which five iterations take every singular value in (0, 1] near 1."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at rate 1, which is about AdamW's (Liu et al. 2025, eq. 4)."""


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, n) U Vᵀ of a matrix U S Vᵀ, roughly: its singular values come out between about 0.7 and 1.2.

    Args:
        matrix: (m, n)
        dtype: what to compute in; bf16 suffices.
    """
    a, b, c = QUINTIC
    tall = len(matrix) > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def orthogonalise_each(stacked: Tensor, matrices: int, dtype: torch.dtype) -> Tensor:
    """(k · m, n) with every one of k matrices that lie below each other orthogonalised."""
    return torch.cat([orthogonalise(matrix, dtype) for matrix in stacked.chunk(matrices)])


class Muon(torch.optim.Optimizer):
    """Muon on the groups whose ``kind`` is muon, AdamW on the others.

    Args:
        groups: as `mm.train.optim.parameter_groups` makes them, with all options of both.
        fused: whether AdamW's kernel is the fused one.
        dtype: what Newton–Schulz computes in.
    """

    def __init__(self, groups: list[dict[str, Any]], fused: bool, dtype: torch.dtype) -> None:
        super().__init__(groups, {"fused": fused, "matrices": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self.state[parameter] = self.state[parameter] or fresh_state(parameter, group)
            if group["kind"] == "muon":
                self._turn(parameters, group)
            elif parameters:
                self._adapt(parameters, group)

    def _turn(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Muon's update. Weights shrink first, as in AdamW."""
        for matrices in _shared_out(parameters):
            updates = [self._momentum(matrix, group["momentum"]) for matrix in matrices]
            count = group["matrices"]
            for matrix, update in zip(matrices, _orthogonalised(updates, count, self.dtype), strict=True):
                rate = RMS * max(len(matrix) // count, matrix.shape[1]) ** 0.5 * group["lr"]
                _local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's update: the running mean of the gradients, as it would be if this one came again."""
        assert parameter.grad is not None
        mean = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)

    def _adapt(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """AdamW's update."""
        states = [self.state[parameter] for parameter in parameters]
        first, second = group["betas"]
        adamw(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            maximize=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def fresh_state(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    """State of a parameter before its first update: what `torch.optim.AdamW` makes, or Muon's momentum."""
    zeros = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2)]
    if group["kind"] == "muon":
        return {"momentum": zeros[0]}
    # The fused kernel counts steps on the device, in a plain tensor even where the moments are DTensors.
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
    return {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def _shared_out(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """As many matrices at a time as processes hold shards of them, like sizes together; single ones if unsharded."""
    waiting: list[nn.Parameter] = []
    for parameter in sorted(parameters, key=lambda parameter: parameter.numel()):
        if not isinstance(parameter, DTensor):
            yield [parameter]
            continue
        waiting.append(parameter)
        if len(waiting) == parameter.device_mesh.shape[-1]:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _orthogonalised(updates: list[Tensor], count: int, dtype: torch.dtype) -> Iterable[Tensor]:
    """What this process holds of every orthogonalised matrix, or of `count` of them in one; of plain tensors, all."""
    if not isinstance(updates[0], DTensor):
        return [orthogonalise_each(update, count, dtype) for update in updates]
    mesh = updates[0].device_mesh
    axis = mesh.ndim - 1  # where replicas hold the matrix too (HSDP), each of them computes it on its own
    own, size, group = mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis)
    shapes = [update.shape for update in updates]
    rows = [[_rows(shape[0], size, rank) for rank in range(size)] for shape in shapes]
    # What I hold of each process's matrix, and what each process holds of mine; some are left without a matrix.
    idle = [0] * (size - len(updates))
    of_theirs = [held[own] * shape[1] for held, shape in zip(rows, shapes, strict=True)] + idle
    of_mine = [held * shapes[own][1] for held in rows[own]] if own < len(updates) else [0] * size

    shards = torch.cat([_local(update).to(dtype).flatten() for update in updates])
    whole = shards.new_empty(sum(of_mine))
    dist.all_to_all_single(whole, shards, of_mine, of_theirs, group)
    if own < len(updates):
        whole = orthogonalise_each(whole.view(shapes[own]), count, dtype).flatten()
    dist.all_to_all_single(shards, whole, of_theirs, of_mine, group)
    pieces = shards.split(of_theirs[: len(updates)])
    return [piece.view(-1, shape[1]) for piece, shape in zip(pieces, shapes, strict=True)]


def _rows(total: int, processes: int, rank: int) -> int:
    """Rows that a process holds of a matrix sharded as `torch.chunk` would: the last ones may hold fewer, or none."""
    each = -(-total // processes)
    return min(max(total - rank * each, 0), each)


def _local(tensor: Tensor) -> Tensor:
    """The rows of a matrix that this process holds."""
    if not isinstance(tensor, DTensor):
        return tensor
    *replicas, rows = tensor.placements
    if rows != Shard(0) or any(placement != Replicate() for placement in replicas):
        raise ValueError(f"Muon takes matrices that are sharded by rows, and one is placed {tensor.placements}")
    return tensor.to_local()
