"""`mm plan` on a small corpus of all modalities."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mm.tokenizers.templates import CHATML
from mm.train.preview import planned, preview, spoken
from mm.train.recipe import Recipe
from tests.shard_files import as_json, write_card, write_tar
from tests.small_world import train_here, write_recipe


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
    used = min(data.plan.statistics().packs, (chosen.steps or 0) * chosen.packing.packs_per_batch)
    assert f"{used:,} of {chosen.packing.capacity:,} tokens" in shown


def test_a_time_is_said_in_its_unit() -> None:
    assert [spoken(seconds) for seconds in (0.1437, 99, 600, 36000, 3.6e7)] == [
        "0.14 seconds",
        "99 seconds",
        "10 minutes",
        "10 hours",
        "10,000 hours",
    ]


def test_a_chat_that_the_template_refuses_is_passed_over_counted_and_named(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    refused = [{"role": "system", "content": "red"}, *asked]
    write_tar(tmp_path / "0.tar", [(f"{key}.json", as_json(chat)) for key, chat in (("a", refused), ("b", asked))])
    card = write_card(tmp_path, ["0.tar"], {"chat": "json"}, name="talk")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    (tmp_path / "refusing.jinja").write_text(refuses)
    held_out = {"held_out": card}
    recipe = write_recipe(
        tmp_path, {"talk": card, "text": card, **held_out}, tokenizer_folder, ["talk"], epochs=1, steps=None
    )
    chosen = Recipe.load(recipe, [f"tokenizer.template={tmp_path / 'refusing.jinja'}"])

    assert planned(chosen).plan.statistics().sources["talk"].dropped["unusable"] == 1
    assert "talk: 1 of 2 rows cannot be used; the first: " in caplog.text
    assert "refuses the roles system, user, assistant: no system turn" in caplog.text
    assert re.search(r"talk +│ unusable +│ +1 ", text_of(chosen))
