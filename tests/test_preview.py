"""`mm plan` on a small corpus of all modalities."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from mm.train.preview import planned, preview
from mm.train.recipe import Recipe
from tests.small_world import train_here


def text_of(recipe: Recipe) -> str:
    written = io.StringIO()
    for table in preview(recipe):
        Console(file=written, width=200).print(table)
    return written.getvalue()


def test_a_look_at_a_recipe_leaves_its_run_folder_alone_and_binds_nothing(recipe: Path, tmp_path: Path) -> None:
    run = f"run={tmp_path / 'run'}"
    small = planned(Recipe.load(recipe, [run]))
    large = planned(Recipe.load(recipe, [run, "packing.capacity=512"]))
    assert small.plan.options.capacity != large.plan.options.capacity == 512
    assert not (tmp_path / "run").exists()


def test_a_look_at_a_run_shows_the_plan_that_it_was_trained_by(recipe: Path, tmp_path: Path) -> None:
    train_here(recipe, f"run={tmp_path / 'run'}", "steps=1")
    assert planned(Recipe.load(recipe, [f"run={tmp_path / 'run'}", "steps=1"])).plan.folder == tmp_path / "run" / "plan"


def test_the_tables_name_every_source_and_the_number_of_packs(recipe: Path, tmp_path: Path) -> None:
    chosen = Recipe.load(recipe, [f"run={tmp_path / 'run'}"])
    data = planned(chosen)
    shown = text_of(chosen)
    assert all(name in shown for name in data.names)
    assert f"{data.plan.statistics().packs:,} of {chosen.packing.capacity:,} tokens" in shown
