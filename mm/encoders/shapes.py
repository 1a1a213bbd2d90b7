"""Output shapes and FLOPs of a module, found without weights and without computing."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def trace(module: nn.Module, *inputs: Any) -> tuple[Any, float]:
    """What `module` gives for inputs on the meta device, and the FLOPs it takes (a multiply-add counts 2).

    The module may live anywhere; its own tensors are neither copied nor touched. Element-wise work is not counted.
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = functional_call(module, stand_ins, inputs)
    return output, float(counter.get_total_flops())
