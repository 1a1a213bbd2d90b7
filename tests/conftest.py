"""Fixtures that several test files share, made once a session of what `tests.small_world` writes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from mm.tokenizers.text import TextTokenizer
from tests.small_world import FORMS, fork_run, train_here, train_together, write_recipe, write_source, write_tokenizer

LONG = ("steps=200", "save_every=100", "validate_every=100", "packing.batch=2")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Card of every source, and of a held-out one, by name."""
    folder = tmp_path_factory.mktemp("corpus")
    cards = {source: write_source(folder, source, rows=24) for source in FORMS}
    held_out = folder / "held_out"
    held_out.mkdir()
    return cards | {"held_out": write_source(held_out, "pages", rows=5, shards=1)}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_tokenizer`."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(str(tokenizer_folder))


class Runs(NamedTuple):
    """Folders of runs of one recipe over all sources, and the recipe.

    one, two: 200 steps of two packs, on one process and on two
    grown, shrunk: what one process saved at step 100 continued by two to step 110, and the other way round
    whole, shared: 8 steps of four packs, on one process and on two
    bf16: the same on two processes in bf16
    """

    recipe: Path
    one: Path
    two: Path
    grown: Path
    shrunk: Path
    whole: Path
    shared: Path
    bf16: Path


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus, tokenizer_folder)


@pytest.fixture(scope="session")
def one(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `Runs`."""
    return train_here(recipe, f"run={tmp_path_factory.mktemp('one')}", *LONG)


@pytest.fixture(scope="session")
def runs(recipe: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    two, shared, bf16 = folder / "two", folder / "shared", folder / "bf16"
    grown = fork_run(one, folder / "grown", step=100)
    train_together(
        folder,
        2,
        [
            [str(recipe), f"run={two}", *LONG],
            [str(recipe), f"run={grown}", *LONG, "steps=110"],
            [str(recipe), f"run={shared}", "steps=8"],
            [str(recipe), f"run={bf16}", "steps=8", "precision=bf16"],
        ],
    )
    shrunk = fork_run(two, folder / "shrunk", step=100)
    train_here(recipe, f"run={shrunk}", *LONG, "steps=110")
    whole = train_here(recipe, f"run={folder / 'whole'}", "steps=8")
    return Runs(recipe, one, two, grown, shrunk, whole, shared, bf16)
