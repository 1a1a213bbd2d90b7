"""Kernels for the head's loss: what follows from their nll alone, and that a wrong one is never used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm.configure import build
from mm.layers.cross_entropy import linear_cross_entropy
from mm.layers.head_loss import KERNELS, HeadLoss, UnusableBackend, from_kernel, validate
from mm.objectives.next_token import NextToken
from tests.test_cross_entropy import gradients, problem

CPU = torch.device("cpu")
OPTIONS = [HeadLoss(), HeadLoss(z_loss=0.1), HeadLoss(label_smoothing=0.2), HeadLoss(0.1, 0.2, real=8)]


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A kernel in plain torch."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def of_the_mean_weight(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The nll of each token, but in the backward every one gets the mean of the weights: what old kernels did."""
    nll = exact(hidden, weight, labels)
    return nll.detach() + nll.mean() - nll.mean().detach()


def of_the_next_label(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return exact(hidden, weight, labels.roll(1))


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_and_gradients_follow_from_the_nll_of_a_kernel(options: HeadLoss) -> None:
    case = problem(23, dtype=torch.float32)
    inputs = (case.hidden, case.weight, case.labels, case.weights)
    found, expected = from_kernel(exact, options, *inputs), options(*inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(found.total, case), gradients(expected.total, case), rtol=1e-4, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_a_kernel_that_agrees_with_the_reference_is_used(options: HeadLoss) -> None:
    validate(exact, options, CPU)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(of_the_mean_weight, "gradient of the states is off by"), (of_the_next_label, "nll is off by")],
)
def test_a_kernel_that_does_not_agree_is_refused_and_told(kernel, wrong: str) -> None:
    with pytest.raises(UnusableBackend, match=f"{wrong}.*objective.backend=reference"):
        validate(kernel, HeadLoss(backend="liger"), CPU)


def test_a_kernel_that_fails_is_refused_with_its_reason() -> None:
    def failing(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")

    with pytest.raises(UnusableBackend, match="cut-cross-entropy failed on a small case: no such instruction"):
        validate(failing, HeadLoss(backend="cut-cross-entropy"), CPU)


@pytest.mark.parametrize("backend", list(KERNELS))
def test_kernels_for_gpus_are_refused_on_a_cpu(backend) -> None:
    objective = build({"_target_": "mm.objectives.next_token.NextToken", "backend": backend}, NextToken)
    with pytest.raises(UnusableBackend, match=f"{backend} runs on NVIDIA GPUs and this run is on cpu"):
        objective.head_loss.check(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("backend", list(KERNELS))
def test_an_installed_kernel_agrees_on_cuda(backend) -> None:
    pytest.importorskip({"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}[backend])
    options = HeadLoss(1e-4, 0.1, backend=backend)
    options.check(torch.device("cuda"))
    case = problem(200, width=64, vocabulary=1000, dtype=torch.bfloat16)
    inputs = [tensor.detach().cuda() for tensor in vars(case).values()]
    torch.testing.assert_close(
        options(*inputs).total, replace(options, backend="reference")(*inputs).total, rtol=0.02, atol=0.1
    )


def test_smoothing_leaves_rows_that_are_no_ids_out() -> None:
    """Against the target written out: 1 − ε on the label and ε / 8 on each of the eight ids."""
    case = problem(19)
    case.labels = case.labels % 8
    target = 0.8 * F.one_hot(case.labels, 11).double() + 0.2 / 8 * (torch.arange(11) < 8).double()
    expected = (case.weights * F.cross_entropy(F.linear(case.hidden, case.weight), target, reduction="none")).sum()
    found = case.losses(label_smoothing=0.2, real=8, chunk=5)
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(found.total, case), gradients(expected, case), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="real is 12 ids, and the head has 11 rows"):
        linear_cross_entropy(case.hidden, case.weight, case.labels, case.weights, real=12)
