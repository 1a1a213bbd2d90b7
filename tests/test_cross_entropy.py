"""The chunked head against autograd through `torch.nn.functional.cross_entropy`, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mm.layers import cross_entropy
from mm.layers.cross_entropy import Losses, linear_cross_entropy

torch.set_num_threads(1)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    weights: Tensor

    def losses(self, **options) -> Losses:
        return linear_cross_entropy(self.hidden, self.weight, self.labels, self.weights, **options)

    def reference(self, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
        logits = F.linear(self.hidden, self.weight)
        loss = F.cross_entropy(logits, self.labels, reduction="none", label_smoothing=label_smoothing)
        return (self.weights * (loss + z_loss * logits.logsumexp(1).square())).sum()


def problem(tokens: int, width: int = 5, vocabulary: int = 11, seed: int = 0, dtype=torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    return Problem(
        hidden=(2 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_(),
        weight=torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        labels=torch.randint(vocabulary, (tokens,), generator=generator),
        weights=torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) > 0.3),
    )


def gradients(total: Tensor, case: Problem) -> tuple[Tensor, ...]:
    """∂total/∂hidden and ∂total/∂weight."""
    return torch.autograd.grad(total, (case.hidden, case.weight))


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 30),
    chunk=st.none() | st.integers(1, 50),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1.0, -0.7, 0.0]),
    seed=st.integers(0, 10_000),
)
def test_total_and_gradients_equal_autograd_through_the_full_logits(
    tokens, width, vocabulary, chunk, z_loss, label_smoothing, scale, seed
):
    case = problem(tokens, width, vocabulary, seed)
    losses = case.losses(z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk)
    expected = case.reference(z_loss, label_smoothing)

    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(scale * losses.total, case), gradients(scale * expected, case), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nll_and_lse_are_those_of_each_token_without_smoothing(label_smoothing):
    case = problem(17)
    losses = case.losses(label_smoothing=label_smoothing, chunk=4)
    logits = case.hidden @ case.weight.T

    torch.testing.assert_close(losses.nll, F.cross_entropy(logits, case.labels, reduction="none"))
    torch.testing.assert_close(losses.lse, logits.logsumexp(1))
    assert not losses.nll.requires_grad
    assert not losses.lse.requires_grad


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (0.1, 0.2)])
def test_gradcheck(z_loss, label_smoothing):
    case = problem(6)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, case.labels, case.weights, z_loss, label_smoothing, chunk=4).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.weight))


def test_bf16_loses_no_more_than_the_rounding_of_its_inputs_and_gradients():
    case = problem(200, width=64, vocabulary=1000, dtype=torch.bfloat16)
    exact = problem(200, width=64, vocabulary=1000, dtype=torch.bfloat16)
    exact.hidden, exact.weight = (t.detach().double().requires_grad_() for t in (exact.hidden, exact.weight))
    losses, expected = case.losses(chunk=64), exact.reference()

    assert losses.total.dtype == losses.nll.dtype == losses.lse.dtype == torch.float32
    assert relative_error(losses.total, expected) < 1e-6
    for gradient, wanted in zip(gradients(losses.total, case), gradients(expected, exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, wanted) < 2**-8


def test_autocast_changes_nothing():
    case = problem(20, dtype=torch.float32)
    plain = case.losses(chunk=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = case.losses(chunk=8)

    assert torch.equal(plain.total, under_autocast.total)
    for one, other in zip(gradients(plain.total, case), gradients(under_autocast.total, case), strict=True):
        assert torch.equal(one, other)


def test_a_float32_master_weight_gets_a_float32_gradient_from_bf16_states():
    case = problem(20, dtype=torch.float32)
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()

    assert [gradient.dtype for gradient in gradients(case.losses().total, case)] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_chunk_does_not_change_the_result(chunk):
    case = problem(23)
    torch.testing.assert_close(case.losses(chunk=chunk), case.losses(chunk=7), rtol=1e-13, atol=1e-13)


def test_inputs_are_left_as_they_are():
    case = problem(9, dtype=torch.float32)
    before = [tensor.detach().clone() for tensor in vars(case).values()]
    case.losses(z_loss=0.1, label_smoothing=0.1, chunk=4).total.backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(vars(case).values(), before, strict=True))


def test_a_kept_graph_gives_the_same_gradient_twice():
    case = problem(9)
    loss = case.losses().total
    first, second = (torch.autograd.grad(loss, case.weight, retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(loss, case.weight)
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    with pytest.raises(RuntimeError, match="used up"):
        torch.autograd.grad(loss, case.weight)


def test_a_tied_embedding_sums_its_gradients_as_input_and_as_head():
    case = problem(12)
    tokens = case.labels.roll(1)

    def gradient(total) -> Tensor:
        case.hidden = F.embedding(tokens, case.weight).tanh()
        return torch.autograd.grad(total(), case.weight)[0]

    torch.testing.assert_close(gradient(lambda: case.losses(chunk=5).total), gradient(case.reference))


def test_no_labels_give_a_zero_that_is_connected_to_both_inputs():
    case = problem(0)
    losses = case.losses()
    for_hidden, for_weight = gradients(losses.total, case)

    assert losses.total == 0
    assert losses.nll.shape == losses.lse.shape == (0,)
    assert for_hidden.shape == (0, 5)
    assert torch.equal(for_weight, torch.zeros(11, 5, dtype=torch.float64))


class RecordedProducts(TorchDispatchMode):
    """Counts the matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("hidden_trained", "weight_trained", "grad_enabled", "products"),
    [(True, True, True, 3), (True, False, True, 2), (False, True, True, 2), (True, True, False, 1)],
)
def test_only_the_gradients_that_are_needed_are_computed(hidden_trained, weight_trained, grad_enabled, products):
    case = problem(8)
    case.hidden.requires_grad_(hidden_trained)
    case.weight.requires_grad_(weight_trained)
    with torch.set_grad_enabled(grad_enabled), RecordedProducts() as recorded:
        total = case.losses(chunk=4).total

    assert recorded.count == 2 * products  # two chunks
    assert total.requires_grad == grad_enabled


def test_a_second_derivative_is_refused():
    case = problem(4)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(case.losses().total, case.hidden, create_graph=True)


def test_mistakes_are_named():
    case = problem(4)
    with pytest.raises(ValueError, match="hidden \\(4, 5\\) and weight \\(11, 4\\)"):
        linear_cross_entropy(case.hidden, case.weight[:, :4], case.labels, case.weights)
    with pytest.raises(ValueError, match="labels \\(3,\\)"):
        linear_cross_entropy(case.hidden, case.weight, case.labels[:3], case.weights)
    with pytest.raises(ValueError, match="chunk is 0"):
        case.losses(chunk=0)
    with pytest.raises(ValueError, match="loss weights require a gradient"):
        linear_cross_entropy(case.hidden, case.weight, case.labels, case.weights.requires_grad_())


def test_where_no_kernel_runs_torch_takes_its_place_with_a_warning(caplog):
    """As on this machine, which has no GPU that could be seen."""
    assert cross_entropy._by_kernel.__wrapped__() is cross_entropy.logits_to_gradient
    assert "torch's operations take its place" in caplog.text
