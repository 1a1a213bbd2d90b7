"""Where the memory of a process goes: what it holds through the whole run, and how much more it has needed at most."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm.configure import RecipeError
from mm.train.optim import OptimOptions, freeze, parameter_groups

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


def check_memory(model: nn.Module, options: OptimOptions, shards: int, available: int) -> None:
    """Raise `RecipeError` if what a process holds through the whole run cannot fit, before any weights are read.

    Counted are weights, gradients and the optimizer's state in float32, divided among the processes that shard them.
    Activations come on top; `mm estimate` counts those.

    Args:
        model: on the meta device.
        available: bytes that the process has.
    """
    freeze(model, options)
    held = held_bytes_of(model, options) // shards
    if held > available:
        raise RecipeError(
            f"weights, gradients and optimizer state take {held / 2**30:.1f} GiB in each of {shards} processes that "
            f"share them, and there are {available / 2**30:.1f} GiB, without counting a single activation. Take more "
            "processes, freeze parts (optim.parts), or a smaller model; `mm estimate RECIPE` shows what would fit"
        )


def held_bytes_of(model: nn.Module, options: OptimOptions) -> int:
    """What `held_bytes` would give in all for a model on one device, from its shapes."""
    total = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    moments = {"adamw": 2, "muon": 1}
    for group in parameter_groups(model, options):
        copies = 1 + moments[group["kind"]] + (options.average is not None)  # gradients, moments, average
        total += 4 * copies * sum(parameter.numel() for parameter in group["params"])
    return total


def local_device() -> torch.device:
    """The GPU of this process, its LOCAL_RANK-th, which becomes torch's current one; or the CPU where there is none.

    Raises:
        RecipeError: there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise RecipeError(
            f"process {number} of this machine has no GPU: there are {gpus}, and each process needs one. Start "
            f"{gpus} (torchrun --nproc-per-node={gpus}), or set CUDA_VISIBLE_DEVICES= (nothing) to train on the CPU"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def memory_of_a_process() -> int:
    """Bytes of the GPU that a process has to itself, or its part of the machine's memory."""
    device = local_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
