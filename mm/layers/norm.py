"""RMS normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019, eq. 4).

    Every part of a block is called with the stream, so that one that treats tokens by modality can take this one's
    place; this one treats all tokens alike.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor, stream: object = None) -> Tensor:
        """(…, D) normalised."""
        return rms_norm(hidden, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(…, D) normalised by its root mean square over the last axis, times weight (D,)."""
    # Compiled code fuses on its own; and the gradients of an autograd function that works in place are compiled wrongly
    # by torch 2.11, without a word (https://github.com/pytorch/pytorch/issues/180642).
    on_cpu = hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.float64)
    if on_cpu and not torch.compiler.is_compiling():
        return _RMSNormOnCPU.apply(hidden, weight, eps)
    return F.rms_norm(hidden, weight.shape, weight, eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """`F.rms_norm` has a fused kernel on CUDA only; on the CPU this takes two fifths of its time and memory traffic."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # With y = x·s·w and s = (mean(x²) + eps)^-½:  dx = s·g·w − x · s³/D · Σ(g·w·x)
        hidden, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        of_hidden = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * (hidden * scale)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            of_hidden = gradient * weight
            along = torch.linalg.vecdot(of_hidden, hidden).unsqueeze(-1)
            along.mul_(scale.pow(3)).div_(-hidden.shape[-1])
            of_hidden.mul_(scale).addcmul_(hidden, along)
        return of_hidden, of_weight, None
