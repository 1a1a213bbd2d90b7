"""Cross-entropy of a linear head whose logits never exist all at once.

    hidden (L, D) ──C rows at a time──▶ logits (C, V) ──in place──▶ gradient (C, V) ─┬─▶ rows of ∂hidden (L, D)
                                        one buffer, reused                           └─▶ added to ∂weight (V, D)

At L = 4096 and V = 150 000 the logits of one micro-batch take 2.5 GB in float32, and autograd keeps them three times.
The loss is the last thing that is computed and the first that is differentiated, so both happen here in one pass over
the chunks: the forward leaves the gradients behind, and the backward only scales them by the one incoming number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

from mm import terminal
from mm.layers.precision import wide_dtype

logger = terminal.logger(__name__)


class Losses(NamedTuple):
    """What the head says about L labels.

    total: () Σ_t w_t · (loss_t + z_loss · lse_t²), the only one with a gradient; loss_t is nll_t unless smoothed
    nll: (L,) negative log-likelihood of each label in nats, never smoothed, detached
    lse: (L,) logarithm of the softmax's denominator, detached
    """

    total: Tensor
    nll: Tensor
    lse: Tensor


def default_chunk(device: str, width: int) -> int:
    """Tokens in a chunk.

    A chunk reads the head twice and adds to its gradient once, so the work per byte grows with the chunk, whatever the
    vocabulary. From 384 on a CPU gains little (benchmarks/cross_entropy.py). On a GPU 512 reach most of the speed, and
    D/2 are free: float32 logits of so many take no more than the head's narrowed gradient in the end, when they are
    gone.
    """
    return 384 if device == "cpu" else max(512, width // 2)


class Terms(NamedTuple):
    """What is asked of the loss; see `linear_cross_entropy`."""

    z_loss: float
    label_smoothing: float
    real: int


class Said(NamedTuple):
    """What the softmax of each row said, (L,) each: see `Losses`, and the mean of the logits of real ids."""

    nll: Tensor
    lse: Tensor
    mean: Tensor

    def of(self, rows: slice) -> Said:
        return Said(*(one[rows] for one in self))


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
        chunk: tokens C at a time; by default `default_chunk`.
        real: the first so many of the V rows are ids, the others fill the table up to a round size; smoothing is over
            ids alone. None: all are.

    Raises:
        ValueError: shapes do not fit, `chunk` is not positive, `real` is not in [1, V], or `weights` requires a
            gradient that it would not get.
    """
    _check(hidden, weight, labels, weights, chunk, real)
    if chunk is None:
        chunk = default_chunk(hidden.device.type, hidden.shape[1])
    return Losses(
        *_LinearCrossEntropy.apply(
            hidden,
            weight.to(hidden.dtype),
            labels,
            weights,
            Terms(z_loss, label_smoothing, len(weight) if real is None else real),
            min(chunk, len(hidden)),
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
        terms: Terms,
        chunk: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inside `forward` gradients are always off and `needs_input_grad` is set under no_grad, too.
        hidden_wanted, weight_wanted = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            total, nll, lse, grad_hidden, grad_weight = _loss_and_gradients(
                hidden, weight, labels, weights, terms, chunk, hidden_wanted, weight_wanted
            )
        # Narrowed here, when the chunk's logits are gone: at once they would be the peak of the memory.
        ctx.gradients = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
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
        return (*scaled, None, None, None, None, None)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    terms: Terms,
    chunk: int,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(total, nll, lse, ∂total/∂hidden, ∂total/∂weight), the last in float32 or wider; None where not wanted."""
    wide = wide_dtype(hidden.dtype)
    if not _multiplies_into_float32(hidden):
        weight = weight.to(wide)
    weights = weights.to(wide)
    said = Said(*hidden.new_zeros(3, len(hidden), dtype=wide).unbind())
    grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if weight_wanted else None
    buffer = hidden.new_empty(chunk, len(weight), dtype=wide)
    to_gradient = _by_kernel() if buffer.is_cuda and wide == torch.float32 else logits_to_gradient

    for start in range(0, len(hidden), max(chunk, 1)):
        rows = slice(start, start + chunk)
        states = hidden[rows].to(weight.dtype)
        logits = _product(states, weight.T, out=buffer[: len(states)])
        wanted = weight.dtype if hidden_wanted or weight_wanted else None
        gradient = to_gradient(logits, labels[rows], weights[rows], said.of(rows), terms, wanted)
        if gradient is None:
            continue
        if grad_hidden is not None:
            grad_hidden[rows] = gradient @ weight
        if grad_weight is not None:
            _accumulate_product(grad_weight, gradient.T, states)

    smooth = (1 - terms.label_smoothing) * said.nll + terms.label_smoothing * (said.lse - said.mean)
    total = torch.dot(weights, smooth + terms.z_loss * said.lse.square())
    return total, said.nll, said.lse, grad_hidden, grad_weight


def logits_to_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, said: Said, terms: Terms, dtype: torch.dtype | None
) -> Tensor | None:
    """(C, V) ∂total/∂logits of a chunk, in the memory of its logits if these have the dtype; None where not wanted.

        ∂total/∂logit_v = w · ((1 + 2 z lse) · softmax_v − (1 − ε) · [v = label] − [v < R] · ε / R), R the real ids

    Args:
        logits: (C, V), overwritten.
        labels, weights: (C,)
        said: (C,) each, written.
        dtype: of the gradient; None: none is wanted.
    """
    label = labels[:, None]
    target = logits.gather(1, label).squeeze(1)
    if terms.label_smoothing:
        torch.mean(logits[:, : terms.real], 1, out=said.mean)
    largest = logits.amax(1, keepdim=True)
    denominator = logits.sub_(largest).exp_().sum(1)
    torch.add(denominator.log(), largest.squeeze(1), out=said.lse)
    torch.sub(said.lse, target, out=said.nll)
    if dtype is None:
        return None
    gradient = logits.mul_((weights * (1 + 2 * terms.z_loss * said.lse) / denominator)[:, None])
    if terms.label_smoothing:
        gradient[:, : terms.real].sub_((weights * terms.label_smoothing / terms.real)[:, None])
    gradient.scatter_add_(1, label, weights[:, None] * (terms.label_smoothing - 1))
    return gradient.to(dtype)


@lru_cache(maxsize=1)
def _by_kernel() -> Callable[[Tensor, Tensor, Tensor, Said, Terms, torch.dtype | None], Tensor | None]:
    """`logits_to_gradient` as a kernel, or as it is, with a warning, where the kernel cannot be used."""
    try:
        from mm.layers.cross_entropy_kernel import logits_to_gradient as by_kernel

        logits, weights, *said = torch.zeros(2, 2, device="cuda"), *torch.zeros(4, 2, device="cuda")
        by_kernel(logits, weights.long(), weights, Said(*said), Terms(0.0, 0.0, 2), torch.bfloat16)
    except Exception as error:
        logger.warning(
            "the loss's kernel cannot be used here, and torch's operations take its place: slower, the same result. "
            "Triton has to be installed and needs a C compiler (apt install gcc): %s",
            error,
        )
        return logits_to_gradient
    return by_kernel


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
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
