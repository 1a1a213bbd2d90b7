"""Cross-entropy of a linear head whose logits never exist all at once.

    hidden (L, D) ──C rows at a time──▶ logits (C, V) ──in place──▶ gradient (C, V) ─┬─▶ rows of ∂hidden (L, D)
                                        one buffer, reused                           └─▶ added to ∂weight (V, D)

At L = 4096 and V = 150 000 the logits of one micro-batch take 2.5 GB in float32, and autograd keeps them three times.
The loss is the last thing that is computed and the first that is differentiated, so both happen here in one pass over
the chunks: the forward leaves the gradients behind, and the backward only scales them by the one incoming number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

CHUNK_ON_CPU, CHUNK = 384, 1024
"""Tokens in a chunk by default. A chunk reads the head twice and adds to its gradient once, so the work per byte grows
with the chunk, whatever the vocabulary. From 384 on a CPU gains little (benchmarks/cross_entropy.py); for GPUs 1024 is
computed: some 300 FLOPs per byte in bf16, where an H100 turns from memory-bound to compute-bound."""


class Losses(NamedTuple):
    """What the head says about L labels.

    total: () Σ_t w_t · (loss_t + z_loss · lse_t²), the only one with a gradient; loss_t is nll_t unless smoothed
    nll: (L,) negative log-likelihood of each label in nats, never smoothed, detached
    lse: (L,) logarithm of the softmax's denominator, detached
    """

    total: Tensor
    nll: Tensor
    lse: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    real: int | None = None,
) -> Losses:
    """Weighted sum of the cross-entropies of ``hidden @ weight.T``, in memory linear in the chunk and not in L × V.

    Logits, losses and sums over chunks are float32 whatever the inputs' dtype (float64 for float64 inputs), also under
    autocast. Gradients are computed for what requires them only: a frozen head costs no gradient, and under
    ``torch.no_grad`` none is computed at all. L = 0 gives a zero that is still connected to `hidden` and `weight`, so
    that a rank without labels takes part in every collective of the backward.

    Differentiable once: ``create_graph=True`` raises a RuntimeError in the backward. The inputs are left as they are;
    `weight` may be the embedding table.

    Args:
        hidden: (L, D) last hidden states of the positions that bear a label.
        weight: (V, D) the head; taken to the dtype of `hidden` if it has another.
        labels: (L,) int64 in [0, V); every row counts, there is no value to ignore.
        weights: (L,) float32 loss weights, without gradient.
        z_loss: factor of lse², which holds the softmax's denominator near 1 (PaLM, section 5: 1e-4).
        label_smoothing: share ε of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        chunk: tokens C at a time; by default `CHUNK_ON_CPU` or `CHUNK`.
        real: the first so many of the V rows are ids, the others fill the table up to a round size; smoothing is over
            ids alone. None: all are.

    Raises:
        ValueError: shapes do not fit, `chunk` is not positive, `real` is not in [1, V], or `weights` requires a
            gradient that it would not get.
    """
    _check(hidden, weight, labels, weights, chunk, real)
    if chunk is None:
        chunk = CHUNK_ON_CPU if hidden.device.type == "cpu" else CHUNK
    return Losses(
        *_LinearCrossEntropy.apply(
            hidden,
            weight.to(hidden.dtype),
            labels,
            weights,
            z_loss,
            label_smoothing,
            min(chunk, len(hidden)),
            len(weight) if real is None else real,
            torch.is_grad_enabled(),
        )
    )


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None, real: int | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (L, D) and (V, D)")
    if labels.shape != (len(hidden),) or weights.shape != (len(hidden),):
        raise ValueError(
            f"labels {tuple(labels.shape)} and weights {tuple(weights.shape)} must be one for each of the "
            f"{len(hidden)} hidden states"
        )
    if weights.requires_grad:
        raise ValueError("the loss weights require a gradient, and none is computed for them; pass weights.detach()")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} tokens and must be at least 1")
    if real is not None and not 1 <= real <= len(weight):
        raise ValueError(f"real is {real} ids, and the head has {len(weight)} rows")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        z_loss: float,
        label_smoothing: float,
        chunk: int,
        real: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inside `forward` gradients are always off and `needs_input_grad` is set under no_grad, too.
        hidden_wanted, weight_wanted = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            total, nll, lse, grad_hidden, grad_weight = _loss_and_gradients(
                hidden, weight, labels, weights, z_loss, label_smoothing, chunk, real, hidden_wanted, weight_wanted
            )
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll, lse)
        return total, nll, lse

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True; `once_differentiable` would drop the term silently
            raise RuntimeError("linear_cross_entropy is differentiable once, and create_graph=True asks for more")
        if ctx.gradients is None:
            raise RuntimeError("the gradients were used up by an earlier backward; pass it retain_graph=True")
        gradients = ctx.gradients
        if graph_is_kept():
            scaled = (gradient if gradient is None else gradient * grad_total for gradient in gradients)
        else:
            # In place and handed over for good: a copy would take as much memory as the head at the worst moment.
            ctx.gradients = None
            scaled = (gradient if gradient is None else gradient.mul_(grad_total) for gradient in gradients)
        return (*scaled, None, None, None, None, None, None, None)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    real: int,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(total, nll, lse, ∂total/∂hidden, ∂total/∂weight), the gradients in the inputs' dtype or None."""
    dtype = hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if not _multiplies_into_float32(hidden):
        weight = weight.to(wide)
    weights = weights.to(wide)
    nll, lse = hidden.new_empty(2, len(hidden), dtype=wide).unbind()
    total = hidden.new_zeros((), dtype=wide)
    grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if weight_wanted else None
    buffer = hidden.new_empty(chunk, len(weight), dtype=wide)

    for start in range(0, len(hidden), max(chunk, 1)):
        rows = slice(start, start + chunk)
        states, label, w = hidden[rows].to(weight.dtype), labels[rows, None], weights[rows]
        logits = _product(states, weight.T, out=buffer[: len(states)])
        target = logits.gather(1, label).squeeze(1)
        mean = logits[:, :real].mean(1) if label_smoothing else 0.0
        largest = logits.amax(1, keepdim=True)
        denominator = logits.sub_(largest).exp_().sum(1)
        lse[rows] = denominator.log() + largest.squeeze(1)
        nll[rows] = lse[rows] - target
        smooth = (1 - label_smoothing) * nll[rows] + label_smoothing * (lse[rows] - mean)
        total += torch.dot(w, smooth + z_loss * lse[rows].square())
        if grad_hidden is None and grad_weight is None:
            continue

        # ∂total/∂logit_v = w · ((1 + 2 z lse) · softmax_v − (1 − ε) · [v = label] − [v < R] · ε / R), R the real ids
        gradient = logits.mul_((w * (1 + 2 * z_loss * lse[rows]) / denominator)[:, None])
        if label_smoothing:
            gradient[:, :real].sub_((w * label_smoothing / real)[:, None])
        gradient.scatter_add_(1, label, w[:, None] * (label_smoothing - 1))
        narrow = gradient.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = narrow @ weight
        if grad_weight is not None:
            _accumulate_product(grad_weight, narrow.T, states)

    return total, nll, lse, grad_hidden, None if grad_weight is None else grad_weight.to(dtype)


def _multiplies_into_float32(operand: Tensor) -> bool:
    """Whether the device multiplies operands of this dtype into float32 without widening them first."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``out = left @ right``, where `out` may be wider than the operands."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where `total` may be wider than the operands."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)
