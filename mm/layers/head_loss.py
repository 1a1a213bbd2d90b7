"""What is asked of the head's loss, and who computes it.

    hidden (L, D), head (V, D), labels, weights (L,) ─HeadLoss─▶ Losses: Σ w (loss + λ lse²), nll, lse

``reference`` is `mm.layers.cross_entropy`, in memory linear in its chunk, on every device. The others are kernels for
NVIDIA GPUs that never write logits at all: Liger (Hsu et al. 2024, arXiv 2410.10989) and cut cross-entropy (Wijmans et
al. 2024, arXiv 2411.09009). They are no part of the suite and their gradients have changed between versions, so one is
used only after it has agreed with the reference on a small random case: per-token weights are what such kernels get
wrong, without a sign, when they scale the summed gradient by one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mm.layers.cross_entropy import Losses, linear_cross_entropy
from mm.layers.precision import wide

Backend = Literal["reference", "liger", "cut-cross-entropy"]

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From hidden (L, D), head (V, D) and labels (L,) to the nll (L,) of each label, differentiable token by token."""

TOLERANCE = 2.0**-5
"""Largest relative error of a kernel's losses and gradients: some roundings of bf16, of 2⁻⁸ each."""


class UnusableBackend(RuntimeError):
    """A backend that is not installed, cannot run here, or does not agree with the reference."""


@dataclass(frozen=True)
class HeadLoss:
    """z_loss, label_smoothing, real: see `linear_cross_entropy`."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    real: int | None = None
    backend: Backend = "reference"

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Losses:
        """The losses of L labels; arguments as of `linear_cross_entropy`."""
        if self.backend == "reference" or not len(hidden):  # kernels are not made for a batch without labels
            return linear_cross_entropy(
                hidden, weight, labels, weights, self.z_loss, self.label_smoothing, real=self.real
            )
        return from_kernel(KERNELS[self.backend](), self, hidden, weight, labels, weights)

    def check(self, device: torch.device) -> None:
        """Raise `UnusableBackend` unless the backend computes on the device what the reference does."""
        if self.backend == "reference":
            return
        if device.type != "cuda":
            raise UnusableBackend(
                f"the loss backend {self.backend} runs on NVIDIA GPUs and this run is on {device.type}; say "
                "objective.backend=reference"
            )
        validate(KERNELS[self.backend](), self, device)


def from_kernel(
    kernel: Kernel, options: HeadLoss, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor
) -> Losses:
    """The losses by a kernel that gives nothing but the nll.

    lse = nll + h · W_label, and the mean logit, which label smoothing needs, is h · mean(W).
    """
    weight = weight.to(hidden.dtype)
    nll = kernel(hidden, weight, labels)
    if not (options.z_loss or options.label_smoothing):
        with torch.no_grad():
            lse = nll + _dot(hidden, weight[labels])
        return Losses((weights * nll).sum(), nll.detach(), lse)
    lse = nll + _dot(hidden, weight[labels])
    smooth = nll
    if options.label_smoothing:
        mean = wide(hidden) @ wide(weight[: options.real]).mean(0)
        smooth = (1 - options.label_smoothing) * nll + options.label_smoothing * (lse - mean)
    total = (weights * (smooth + options.z_loss * lse.square())).sum()
    return Losses(total, nll.detach(), lse.detach())


def validate(kernel: Kernel, options: HeadLoss, device: torch.device) -> None:
    """Compare a kernel with the reference on a small random case of uneven weights, in bf16 as it is used.

    Raises:
        UnusableBackend: it fails, or the losses or gradients are others.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 96, 64, 1000
    hidden = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(vocabulary, width, generator=generator) / 4).to(device, torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    weights = torch.rand(tokens, generator=generator).square().to(device)
    options = replace(options, real=vocabulary - 100 if options.real else None)

    def computed(by: Callable[..., Losses]) -> dict[str, Tensor]:
        inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        losses = by(*inputs, labels, weights)
        gradients = torch.autograd.grad(losses.total, inputs)
        found = (losses.nll, losses.lse, *gradients)
        return dict(zip(("nll", "logsumexp", "gradient of the states", "gradient of the head"), found, strict=True))

    expected = computed(replace(options, backend="reference"))
    try:
        found = computed(lambda *inputs: from_kernel(kernel, options, *inputs))
    except Exception as error:
        raise UnusableBackend(
            f"the loss backend {options.backend} failed on a small case: {error}; say objective.backend=reference"
        ) from error
    for name, value in found.items():
        wanted = expected[name].float()
        error = float((value.float() - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE:
            raise UnusableBackend(
                f"the loss backend {options.backend} does not agree with the reference on a small case of uneven "
                f"weights: its {name} is off by {error:.1%}, allowed is {TOLERANCE:.1%}; say "
                "objective.backend=reference, or install another version"
            )


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """(L,) products of the rows of two (L, D) matrices, in at least float32."""
    return (wide(left) * wide(right)).sum(1)


@lru_cache(maxsize=1)
def _liger() -> Kernel:
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )
    except ImportError as error:
        raise UnusableBackend(
            "the loss backend liger is not installed: pip install liger-kernel, or say objective.backend=reference"
        ) from error
    return lambda hidden, weight, labels: liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")


@lru_cache(maxsize=1)
def _cut_cross_entropy() -> Kernel:
    try:
        from cut_cross_entropy import linear_cross_entropy as cut  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnusableBackend(
            "the loss backend cut-cross-entropy is not installed: pip install cut-cross-entropy, or say "
            "objective.backend=reference"
        ) from error
    # Without a filter no gradient is left out for being small: with weights, small is relative.
    return lambda hidden, weight, labels: cut(hidden, weight, labels, reduction="none", filter_eps=None)


KERNELS: dict[Backend, Callable[[], Kernel]] = {"liger": _liger, "cut-cross-entropy": _cut_cross_entropy}
