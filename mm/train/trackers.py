"""Experiment trackers that figures go to beside ``metrics.jsonl``: Weights & Biases and trackio, which are optional.

A run is known to a tracker by an id in its folder, ``RUN/tracker-id``, so that a resumed run goes on there as the same
one. Both take figures by the step of the run. Steps that a killed run had reported after its last checkpoint stand
there twice, since neither forgets.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mm.allow import is_available
from mm.configure import RecipeError
from mm.train.recipe import LogTo, Recipe

PROJECT = "mm"
"""Where runs appear; `WANDB_PROJECT` chooses another for Weights & Biases."""


def check_installed(log_to: Sequence[LogTo]) -> None:
    """Raise `RecipeError` where a tracker's package is missing."""
    missing = [name for name in log_to if name != "tensorboard" and not is_available(name)]
    if missing:
        raise RecipeError(
            f"log_to names {' and '.join(missing)}, which this environment does not have: "
            f"pip install {' '.join(missing)}, or leave it out of log_to"
        )


class WandB:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it in ``RUN/wandb`` until ``wandb sync``."""

    def __init__(self, recipe: Recipe) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=recipe.name,
            id=tracker_id(recipe.folder),
            resume="allow",
            dir=recipe.folder,
            config=asdict(recipe),
        )
        # Its own count of steps only ascends, and would drop what a resumed run reports again.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its local database: ``trackio show --project mm``."""

    def __init__(self, recipe: Recipe) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        name = f"{recipe.name} {tracker_id(recipe.folder)}"
        self._run = trackio.init(PROJECT, name, resume="allow", embed=False, config=asdict(recipe))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def tracker_id(folder: Path) -> str:
    """The id of a run, drawn when it is first asked for."""
    path = folder / "tracker-id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
