"""The step from a chunk's logits to its gradient in one kernel for NVIDIA GPUs, in the memory of the logits.

    a row of logits (V,) float32 ──first pass──▶ lse, nll, mean
                                 ──second pass─▶ the row of the gradient, in bf16 in the first half of the same bytes

torch's operations move each logit about ten times between memory and processor for it, this kernel three times (the
second pass finds the row in the cache). Written in Triton, which torch for NVIDIA GPUs brings along; importing this
module raises an ImportError without it. With TRITON_INTERPRET=1 in the environment it runs, slowly, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import triton
from torch import Tensor
from triton import language as tl

from mm.layers.cross_entropy import Said, Terms

BLOCK, WARPS = 4096, 8
"""Logits at a time of one row, and warps that share them; the fastest of some on an H200."""


def logits_to_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, said: Said, terms: Terms, dtype: torch.dtype | None
) -> Tensor | None:
    """As `mm.layers.cross_entropy.logits_to_gradient`, for contiguous float32 logits and a dtype of 4 or 2 bytes.

    A label that is no row of the head gives a loss that is NaN, where torch's operations raise an error.

    Returns:
        (C, V) the gradient, in the memory of the logits in any case; its rows are 4 V bytes apart.
    """
    rows, vocabulary = logits.shape
    gradient = logits.view(dtype or logits.dtype)[:, :vocabulary]
    launch = cast(Callable[..., None], _logits_to_gradient[(rows,)])
    launch(
        logits,
        gradient,
        labels.contiguous(),
        weights.contiguous(),
        *said,
        logits.stride(0),
        gradient.stride(0),
        terms.z_loss,
        terms.label_smoothing,
        vocabulary=vocabulary,
        real=terms.real,
        differentiate=dtype is not None,
        block=BLOCK,
        num_warps=WARPS,
    )
    return gradient if dtype else None


@triton.jit
def _logits_to_gradient(
    logits,
    gradient,
    labels,
    weights,
    nll,
    lse,
    mean,
    logits_stride,
    gradient_stride,
    z_loss,
    label_smoothing,
    vocabulary: tl.constexpr,
    real: tl.constexpr,
    differentiate: tl.constexpr,
    block: tl.constexpr,
):
    """One row for each program."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient += row * gradient_stride
    lanes = tl.arange(0, block)

    # Each lane keeps its largest logit and Σ exp(logit − largest), as Milakov & Gimelshein 2018 (Algorithm 3) do.
    largest = tl.full((block,), float("-inf"), tl.float32)
    denominator = tl.zeros((block,), tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, vocabulary, block):
        at = start + lanes
        logit = tl.load(logits + at, mask=at < vocabulary, other=float("-inf"))
        larger = tl.maximum(largest, logit)
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a lane beyond a small vocabulary never has a logit
        denominator = denominator * tl.exp(largest - shift) + tl.exp(logit - shift)
        largest = larger
        total += tl.where(at < real, logit, 0.0)
    peak = tl.max(largest, 0)
    logsumexp = peak + tl.log(tl.sum(denominator * tl.exp(largest - peak), 0))

    label = tl.load(labels + row)
    weight = tl.load(weights + row)
    target = tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan"))
    tl.store(nll + row, logsumexp - target)
    tl.store(lse + row, logsumexp)
    tl.store(mean + row, tl.sum(total, 0) / real)

    if differentiate:
        for start in range(0, vocabulary, block):
            at = start + lanes
            logit = tl.load(logits + at, mask=at < vocabulary, other=float("-inf"))
            value = weight * (1 + 2 * z_loss * logsumexp) * tl.exp(logit - logsumexp)
            value -= tl.where(at == label, weight * (1 - label_smoothing), 0.0)
            value -= tl.where(at < real, weight * label_smoothing / real, 0.0)
            # Narrower values end before the logits that are still to be read, but among those that were just read.
            tl.debug_barrier()
            tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < vocabulary)
