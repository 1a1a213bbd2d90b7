"""Where the memory of a process goes: what it holds through the whole run, and how much more it has needed at most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MemoryPart = Literal["parameters", "gradients", "optimizer"]


@dataclass(frozen=True)
class Memory:
    """Memory of this process on the device that computes.

    held: bytes by part, see `held_bytes`; nothing where the parts are not known
    """

    device: torch.device
    held: Mapping[MemoryPart, int]

    def peak(self) -> int:
        """The most that was allocated at once since the process began: on a GPU by torch, else resident in all."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[MemoryPart, int]:
    """Bytes of parameters, gradients of those that train, and optimizer state on a device, of this process's shards.

    Their sizes do not change as a run goes on, so they are counted once, after `materialise_state`. What is offloaded
    to the host's memory is not on the device.
    """
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "parameters": _bytes_on(device, parameters),
        "gradients": _bytes_on(device, (parameter for parameter in parameters if parameter.requires_grad)),
        "optimizer": _bytes_on(device, states),
    }


def peak_resident() -> int:
    """Bytes of memory that this process has had resident at most.

    ``VmHWM``, not `resource.getrusage`: a process that was started by a larger one begins with that one's mark there.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kibibytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(kibibytes)


def _bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device.type == device.type)
