"""Objectives of a user that go wrong on one rank at one step, for tests of what a run does then."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.objectives.next_token import NextToken


@dataclass(frozen=True)
class Faulty(NextToken, ABC):
    """Goes wrong on the last rank, in the call with this number."""

    call: int = 2

    def loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        share, sums = super().loss(*args, **kwargs)
        calls.append(self.call)
        is_last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))
        return (self.go_wrong(share) if is_last and len(calls) == self.call else share), sums

    @abstractmethod
    def go_wrong(self, share: Tensor) -> Tensor: ...


class Hanging(Faulty):
    def go_wrong(self, share: Tensor) -> Tensor:
        time.sleep(600)
        return share


class Raising(Faulty):
    def go_wrong(self, share: Tensor) -> Tensor:
        raise ArithmeticError("the answer is not 42")


class NotFinite(Faulty):
    def go_wrong(self, share: Tensor) -> Tensor:
        return share * float("nan")


class OutOfMemory(Faulty):
    def go_wrong(self, share: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class NeverFinite(NextToken):
    """Goes wrong in every call, on all ranks."""

    def loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        share, sums = super().loss(*args, **kwargs)
        return share * float("nan"), sums


calls: list[int] = []
