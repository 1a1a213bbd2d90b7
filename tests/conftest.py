"""Fixtures that several test files share, made once a session of what `tests.small_world` writes.

The processes of pytest-xdist share them too: the first that needs one makes it, and others wait.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from mm.allow import allow
from mm.tokenizers.text import TextTokenizer
from tests.small_world import FORMS, fork_run, train_here, train_together, write_recipe, write_source, write_tokenizer

# How long an example takes is a matter of the machine and of what else runs there; pytest's timeout ends hangs.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("suite")

LONG = ("steps=200", "save_every=100", "validate_every=100", "packing.batch=2")


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, where runs of any number of processes agree, but for ``pytest -m gpu``.

    Their recipes name components of the tests, in the processes that they start as well.
    """
    allow(["tests"])
    if config.option.markexpr.strip() == "gpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the process's first product
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes that run tests of this session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, the first time that it is asked for."""
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(session_folder: Path) -> dict[str, Path]:
    """Card of every source, and of a held-out one, by name."""

    def make(folder: Path) -> None:
        (folder / "held_out").mkdir()
        cards = {source: write_source(folder, source, rows=24) for source in FORMS}
        cards["held_out"] = write_source(folder / "held_out", "pages", rows=5, shards=1)
        (folder / "cards.json").write_text(json.dumps({name: str(card) for name, card in cards.items()}))

    folder = once(session_folder / "corpus", make)
    return {name: Path(card) for name, card in json.loads((folder / "cards.json").read_text()).items()}


@pytest.fixture(scope="session")
def tokenizer_folder(session_folder: Path) -> Path:
    """See `write_tokenizer`."""
    return once(session_folder / "tokenizer", write_tokenizer)


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
def recipe(session_folder: Path, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    folder = once(session_folder / "recipe", lambda folder: write_recipe(folder, corpus, tokenizer_folder))
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def one(recipe: Path, session_folder: Path) -> Path:
    """See `Runs`."""
    return once(session_folder / "one", lambda folder: train_here(recipe, f"run={folder}", *LONG))


@pytest.fixture(scope="session")
def runs(recipe: Path, one: Path, session_folder: Path) -> Runs:
    def make(folder: Path) -> None:
        grown = fork_run(one, folder / "grown", step=100)
        train_together(
            folder,
            2,
            [
                [str(recipe), f"run={folder / 'two'}", *LONG],
                [str(recipe), f"run={grown}", *LONG, "steps=110"],
                [str(recipe), f"run={folder / 'shared'}", "steps=8"],
                [str(recipe), f"run={folder / 'bf16'}", "steps=8", "precision=bf16"],
            ],
        )
        shrunk = fork_run(folder / "two", folder / "shrunk", step=100)
        train_here(recipe, f"run={shrunk}", *LONG, "steps=110")
        train_here(recipe, f"run={folder / 'whole'}", "steps=8")

    folder = once(session_folder / "runs", make)
    return Runs(recipe, one, *(folder / name for name in Runs._fields[2:]))
