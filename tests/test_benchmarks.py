"""Benchmarks are run by hand, so that nobody would notice when one no longer fits the code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from mm.packing.weights import Prior

FOLDER = Path(__file__).parents[1] / "benchmarks"
OTHERS = {"loader_energon"}
"""Import packages that the suite does without."""


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS))
def test_every_benchmark_can_be_imported(name: str) -> None:
    import_module(f"benchmarks.{name}")


def test_weights_of_a_reference_are_divided_out_of_what_a_weighted_model_believes() -> None:
    """The least of −Σ p w log q over q is at q ∝ p w, found by descent: divided by w it is p again."""
    from benchmarks.prior import without_weights

    generator = torch.Generator().manual_seed(0)
    truth, reference = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    factor = Prior(alpha=1.0)
    weights = torch.from_numpy(factor.weight(reference.numpy()))
    logits = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = -(truth.exp() * weights * logits.log_softmax(-1)).sum()
        found.backward()
        return found

    optimizer.step(loss)
    believed = logits.detach().log_softmax(-1)
    assert (believed - truth).abs().max() > 0.05
    torch.testing.assert_close(without_weights(believed, reference, factor), truth, rtol=0, atol=1e-4)
