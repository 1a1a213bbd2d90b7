"""The kernel that turns logits into their gradient, on a CPU by Triton's interpreter, against autograd in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

INTERPRETED = """
import sys
import torch
from mm.layers.cross_entropy import Said, Terms
from mm.layers.cross_entropy_kernel import logits_to_gradient

for case in (cases := torch.load(sys.argv[1])):
    logits = case["logits"].clone()
    said = Said(*torch.zeros(3, len(logits)).unbind())
    dtype = case["dtype"]
    gradient = logits_to_gradient(logits, case["labels"], case["weights"], said, Terms(*case["terms"]), dtype)
    case["found"] = (*said, gradient.clone() if dtype else None)
    case["kept"] = torch.equal(logits, case["logits"])
torch.save(cases, sys.argv[1])

said = Said(*torch.zeros(3, 4).unbind())
mixed = torch.tensor([[1, 9], [5, 9], [-100, 9], [4, 9]])
logits_to_gradient(torch.zeros(4, 5), mixed[:, 0], torch.ones(4), said, Terms(0.0, 0.0, 5), torch.float32)
torch.save(said.nll, sys.argv[2])
"""

SIZES = {
    "a tiny vocabulary": (3, 5, 5),
    "two blocks and an odd rest": (4, 9001, 9001),
    "a filled table": (2, 4224, 4097),
}
"""Rows, vocabulary and real ids."""
CASES = [
    (name, z_loss, smoothing, dtype)
    for name in SIZES
    for z_loss, smoothing in ((0.0, 0.0), (0.01, 0.1))
    for dtype in (torch.bfloat16, torch.float32, None)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the interpreted kernel has left what it computed."""
    pytest.importorskip("triton")
    cases = []
    for name, z_loss, smoothing, dtype in CASES:
        rows, vocabulary, real = SIZES[name]
        generator = torch.Generator().manual_seed(len(cases))
        logits = 4 * torch.randn(rows, vocabulary, generator=generator)
        labels = torch.randint(real, (rows,), generator=generator)
        labels[-1] = real - 1
        weights = torch.rand(rows, generator=generator)
        terms = (z_loss, smoothing, real)
        cases.append({"logits": logits, "labels": labels, "weights": weights, "terms": terms, "dtype": dtype})
    folder = tmp_path_factory.mktemp("kernel")
    torch.save(cases, folder / "cases.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", INTERPRETED, str(folder / "cases.pt"), str(folder / "outside.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def computed(folder: Path) -> list[dict]:
    return torch.load(folder / "cases.pt")


def expected(logits: Tensor, labels: Tensor, weights: Tensor, terms: tuple[float, float, int]) -> tuple[Tensor, ...]:
    """(nll, lse, mean, gradient) in float64."""
    z_loss, smoothing, real = terms
    logits = logits.double().requires_grad_()
    nll, lse, mean = F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1), logits[:, :real].mean(1)
    loss = (1 - smoothing) * nll + smoothing * (lse - mean) + z_loss * lse.square()
    (gradient,) = torch.autograd.grad((weights.double() * loss).sum(), logits)
    return nll.detach(), lse.detach(), mean.detach(), gradient


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_losses_and_gradient_are_those_of_autograd(computed: list[dict], number: int) -> None:
    case = computed[number]
    *said, gradient = case["found"]
    *wanted, exact = expected(case["logits"], case["labels"], case["weights"], case["terms"])
    for one, other in zip(said, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    if case["dtype"] is None:
        assert case["kept"]
        return
    assert gradient.dtype == case["dtype"]
    rounding = 2.0**-7 if case["dtype"] == torch.bfloat16 else 1e-5  # the interpreter cuts bits off; a GPU rounds
    assert float((gradient.double() - exact).norm() / exact.norm()) < rounding


def test_a_label_that_is_no_row_of_the_head_is_seen_in_the_loss(folder: Path) -> None:
    assert torch.load(folder / "outside.pt").isnan().tolist() == [False, True, True, False]
