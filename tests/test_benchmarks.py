"""Benchmarks are run by hand, so that nobody would notice when one no longer fits the code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
OTHERS = {"loader_energon"}
"""Import packages that the suite does without."""


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS))
def test_every_benchmark_can_be_imported(name: str) -> None:
    import_module(f"benchmarks.{name}")
