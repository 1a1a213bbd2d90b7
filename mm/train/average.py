"""The average of the trained parameters over updates, which generalises better than any of them (Polyak and Juditsky
1992; Izmailov et al. 2018).

    update t:  average ← d_t · average + (1 − d_t) · parameter,   d_t = min(decay, t / (t + warmup)),   t = 0, 1, …

It is part of the optimizer's state: sharded like the parameter, float32 like it, saved and loaded by its name, and
updated whenever the optimizer updates, so not in steps that are skipped. Parameters that do not train have none: they
are their own average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mm.bounds import Factor, Share
from mm.configure import RecipeError

AVERAGE, UPDATES = "average", "averaged"
"""Keys in the state of a parameter: its average, and of how many updates."""


@dataclass
class AverageOptions:
    """`optim.average:` of a recipe; ``{}`` takes the defaults.

    decay: d, share of the average that an update keeps: it spans about the last 1 / (1 − d) updates
    warmup: w; early on the average spans about the last w-th part of the run instead, so that it forgets where the run
        began. 0 keeps `decay` from the second update on
    validate: report the validation loss of the average too, which takes the same time again
    """

    decay: Share = 0.9999
    warmup: Factor = 10.0
    validate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise RecipeError(f"optim.average.decay is {self.decay} and must be at least 0 and below 1")
        if self.warmup < 0:
            raise RecipeError(f"optim.average.warmup is {self.warmup} and must be at least 0")

    def kept(self, updates: int) -> float:
        """d_t, the share of the average that the next update keeps, after so many of them."""
        return min(self.decay, updates / (updates + self.warmup)) if updates else 0.0


def fresh_average(parameter: nn.Parameter) -> dict[str, Any]:
    """State of an average before its first update, which copies the parameter."""
    return {AVERAGE: parameter.detach().clone(), UPDATES: 0}


@torch.no_grad()
def update_averages(optimizer: torch.optim.Optimizer, options: AverageOptions) -> None:
    """Take the parameters as they are now into their averages."""
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for parameter, state in _averaged(optimizer):
        averages, parameters = by_weight[1 - options.kept(state[UPDATES])]
        averages.append(_local(state[AVERAGE]))
        parameters.append(_local(parameter))
        state[UPDATES] += 1
    for weight, (averages, parameters) in by_weight.items():
        torch._foreach_lerp_(averages, parameters, weight)


@torch.no_grad()
def begin_averages(optimizer: torch.optim.Optimizer) -> None:
    """Let averages without an update so far be their parameters, which a load may have changed."""
    for parameter, state in _averaged(optimizer):
        if not state[UPDATES]:
            _local(state[AVERAGE]).copy_(_local(parameter))


@contextmanager
def averaged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The model with the averages in place of its parameters; afterwards both are what they were, bit by bit."""
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


@torch.no_grad()
def _exchange(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in _averaged(optimizer):
        here, there = _local(parameter), _local(state[AVERAGE])
        kept = here.clone()
        here.copy_(there)
        there.copy_(kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or it would go on with the copies that it gathered of what was there before


def _averaged(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """Parameters that have an average, with their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if AVERAGE in optimizer.state[parameter]:
                yield parameter, optimizer.state[parameter]


def _local(tensor: Tensor) -> Tensor:
    """This process's part, whose storage is the tensor's."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
