"""A run that learns nothing says so: samples without a label, steps without weight, broken samples and their share."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mm.packing.plan import FORMAT, PlanChanged, PlanError
from mm.report.history import History, Stage
from mm.report.run import report_of_run
from mm.sample import Image, Sample, Text
from mm.train.export import export_run
from mm.train.ledger import Ledger, Tally
from mm.train.preview import preview
from mm.train.recipe import DataOptions, Recipe
from mm.train.sources import Blueprint, first_labels
from mm.train.stages import RunError
from tests.shard_files import as_json, write_card, write_tar
from tests.small_world import (
    ENCODERS,
    fork_run,
    losses,
    picture,
    train_here,
    train_together,
    write_recipe,
    write_source,
)

MASKED: Any = [{"text": {"from": "txt", "loss": False}}]


def masked(folder: Path, rows: int = 8) -> Path:
    """The card of a source whose words bear no loss."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / "masked.tar", [(f"{row:03d}.txt", b"some words") for row in range(rows)])
    return write_card(folder, "masked.tar", MASKED, name="masked")


def long_questions(folder: Path, long: Sequence[bool]) -> Path:
    """The card of chats whose questions are 300 bytes or a word, and whose answers are a word."""
    folder.mkdir(exist_ok=True)
    turns = [
        [{"from": "human", "value": "question " * (33 if one else 1)}, {"from": "gpt", "value": "short"}]
        for one in long
    ]
    write_tar(folder / "chats.tar", [(f"{row:03d}.json", as_json(turn)) for row, turn in enumerate(turns)])
    return write_card(folder, "chats.tar", {"chat": "json"}, name="questions")


@pytest.fixture
def write(tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path) -> Any:
    """Write a recipe of three steps over one source of words."""

    def written(card: Path, **changes: Any) -> Path:
        text_only = {"model": {"decoder": {"config": SMALL}}}
        data = {
            "sources": {"mine": {"card": str(card)}},
            "index": str(tmp_path / "cache"),
            "workers": 0,
        }
        packing = {"capacity": 128, "batch": 2, "window": 8, "too_long": "truncate"}
        defaults = {"steps": 3, "data": data, "packing": packing, **text_only}
        return write_recipe(tmp_path, corpus, tokenizer_folder, ["text"], **(defaults | changes))

    return written


SMALL = {"vocabulary": 259, "width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 16, "ffn": 16}


def tables(recipe: Path, *changes: str) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        for part in preview(Recipe.load(recipe, changes)):
            console.print(part)
    return capture.get()


# ------------------------------------------------------------------------------------------------------------ the plan


def test_a_source_without_any_label_is_refused_before_training(tmp_path: Path, write: Any) -> None:
    recipe = write(masked(tmp_path / "data"))
    message = r"source mine: none of its 8 rows can be used: 8 without a label\. .*`loss: true`"
    with pytest.raises(PlanError, match=message):
        train_here(recipe)
    with pytest.raises(PlanError, match=message):
        tables(recipe)


def test_answers_that_truncation_cuts_off_are_no_labels(tmp_path: Path, write: Any) -> None:
    recipe = write(long_questions(tmp_path / "data", [True] * 4))
    with pytest.raises(PlanError, match=r"4 without a label.*raise packing\.capacity"):
        tables(recipe)
    assert "without a label" not in tables(recipe, "packing.capacity=400")


def test_samples_without_a_label_are_left_out_and_counted_by_mm_plan(tmp_path: Path, write: Any) -> None:
    recipe = write(long_questions(tmp_path / "data", [True, False, False, True, False]), steps=None, epochs=1.0)
    shown = tables(recipe)
    assert [line.split("│")[1:4] for line in shown.splitlines() if "without a label" in line] == [
        [" mine   ", " without a label ", "                     2 "]
    ]
    run = train_here(recipe)
    assert sum(json.loads(line)["data/samples"] for line in (run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "change",
    [
        "data.sources.mine.weights={none: {_target_: mm.packing.weights.Scale, weight: 0}}",
        "data.sources.mine.weights={none: {_target_: mm.packing.weights.Modalities, weights: {text: 0}}}",
        "objective={_target_: mm.objectives.next_token.NextToken, modality_weights: {text: 0}}",
    ],
)
def test_a_source_whose_labels_all_weigh_nothing_has_none(tmp_path: Path, write: Any, change: str) -> None:
    recipe = write(long_questions(tmp_path / "data", [False] * 4))
    with pytest.raises(PlanError, match="none of its 4 rows can be used: 4 without a label"):
        train_here(recipe, change)


def test_validation_without_a_label_is_refused_before_training(tmp_path: Path, write: Any) -> None:
    recipe = write(long_questions(tmp_path / "data", [False] * 4))
    held_out = masked(tmp_path / "held_out")
    with pytest.raises(PlanError, match="source held_out: none of its 8 rows can be used: 8 without a label"):
        train_here(recipe, f"data.validation={{held_out: {{card: {held_out}}}}}")


def test_a_plan_of_other_label_rules_is_refused(tmp_path: Path, write: Any) -> None:
    recipe = write(long_questions(tmp_path / "data", [False] * 4))
    plan = train_here(recipe, "steps=1") / "plan" / "plan.json"
    entry = json.loads(plan.read_text())
    entry["parts"]["format"] = FORMAT - 1
    plan.write_text(json.dumps(entry))
    with pytest.raises(PlanChanged, match=rf"format: {FORMAT - 1} → {FORMAT}"):
        train_here(recipe, "steps=2")


def test_where_labels_begin_counts_media_and_the_words_before(recipe: Path) -> None:
    processor = Blueprint.of(Recipe.load(recipe)).processor
    image = Image(picture(1))
    caption = Sample("a", "1", (image, Text("ab")))
    page = Sample("a", "2", (Text("abc", loss=False), image, Text("de", loss=False), Text("f")))
    lead = Sample("a", "3", (Text("abc"), image))
    silent = Sample("a", "4", (Text("abc", loss=False), image))
    found = [list(processor.text_length(sample)) for sample in (caption, page, lead, silent)]
    assert found == [[3, 0, 0, 0], [7, 3, 5, 0], [4, 3, 1, 0], [4, 3, -1, 0]]
    learned = Blueprint.of(Recipe.load(recipe)).learned
    assert learned is not None
    media = torch.full((4, 1), 10).numpy()
    assert first_labels(torch.tensor(found)[:, None].numpy(), media, learned).tolist() == [[10], [15], [1], [14]]


# --------------------------------------------------------------------------------------------------- steps that do not


def only_broken(folder: Path) -> Path:
    return write_source(folder, "pairs", rows=8, shards=1, broken=range(8))


IMAGE_MODEL = {"decoder": {"config": SMALL}, "encoders": {"image": ENCODERS["image"]}}


@pytest.fixture
def broken_recipe(tmp_path: Path, write: Any) -> Path:
    """Twelve steps of two samples, one a pack, all of them broken, with weights that decay."""
    (tmp_path / "data").mkdir()
    packing = {"capacity": 128, "batch": 2, "window": 8, "policy": "one-per-pack"}
    return write(only_broken(tmp_path / "data"), model=IMAGE_MODEL, packing=packing, optim={"weight_decay": 10.0})


def test_a_step_without_weight_changes_nothing_and_a_run_of_them_is_no_success(
    tmp_path: Path, broken_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match="none of the 2 steps has made an update"):
        train_here(broken_recipe, "steps=2", "data.max_broken=1", "save_every=1")
    run = tmp_path / "run"
    assert losses(run) == {}
    assert losses(run, "gradient_norm") == {}
    assert losses(run, "skipped_updates") == {1: 1, 2: 1}
    assert "step 1: nothing in the batch bears loss, the update was skipped" in caplog.text
    first, second = (
        load_file(
            export_run(run / "checkpoints" / f"step-0000000{step}", tmp_path / f"out-{step}") / "model.safetensors"
        )
        for step in (1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_without_weight_end_the_run_after_five_in_a_row(broken_recipe: Path) -> None:
    with pytest.raises(
        RunError, match="5 updates in a row were skipped, up to step 5: nothing in the batch bears loss"
    ):
        train_here(broken_recipe, "steps=12", "data.max_broken=1")


@pytest.mark.parametrize("steps", [2, 4])
def test_repeating_the_command_does_not_make_a_run_without_an_update_a_success(broken_recipe: Path, steps: int) -> None:
    with pytest.raises(RunError, match="none of the 2 steps has made an update"):
        train_here(broken_recipe, "steps=2", "data.max_broken=1", "log_every=2")
    with pytest.raises(RunError, match=f"none of the {steps} steps has made an update"):
        train_here(broken_recipe, f"steps={steps}", "data.max_broken=1", "log_every=2")


def test_skipped_steps_in_a_row_are_counted_over_resumes(broken_recipe: Path) -> None:
    with pytest.raises(RunError, match="none of the 3 steps"):
        train_here(broken_recipe, "steps=3", "data.max_broken=1")
    with pytest.raises(RunError, match="5 updates in a row were skipped, up to step 5"):
        train_here(broken_recipe, "steps=12", "data.max_broken=1")


def test_two_processes_skip_a_step_only_if_neither_has_weight(tmp_path: Path, write: Any) -> None:
    """In the first run one of two processes has only broken samples in each step, in the second both have in some."""
    (tmp_path / "data").mkdir()
    card = write_source(tmp_path / "data", "pairs", rows=8, shards=1, broken=range(0, 8, 2))
    packing = {"capacity": 128, "batch": 2, "window": 8, "policy": "one-per-pack"}
    recipe = write(card, model=IMAGE_MODEL, packing=packing, steps=None, epochs=2.0)
    run = tmp_path / "both"
    train_together(tmp_path, 2, [[str(recipe), f"run={run}", "data.max_broken=1"]])
    skipped, learned = losses(run, "skipped_updates"), losses(run)
    assert set(skipped) == set(range(1, 9))
    assert {step for step, count in skipped.items() if not count} == set(learned)
    broken = losses(run, "data/broken")
    assert {step for step, count in broken.items() if count == 2} == {step for step, count in skipped.items() if count}


def test_validation_that_is_all_broken_stops_the_run(tmp_path: Path, write: Any) -> None:
    (tmp_path / "held_out").mkdir()
    (tmp_path / "data").mkdir()
    card = write_source(tmp_path / "data", "pairs", rows=8, shards=1)
    recipe = write(card, model=IMAGE_MODEL)
    held_out = only_broken(tmp_path / "held_out")
    with pytest.raises(RunError, match="nothing in the validation split bears loss: 8 of its samples are broken"):
        train_here(recipe, f"data.validation={{held_out: {{card: {held_out}}}}}")


# ------------------------------------------------------------------------------------------------------ broken samples


@pytest.fixture
def some_broken(tmp_path: Path, write: Any) -> Path:
    """An epoch of 20 samples, five of them broken, two a step."""
    (tmp_path / "data").mkdir()
    card = write_source(tmp_path / "data", "pairs", rows=20, shards=1, broken=range(0, 20, 4))
    packing = {"capacity": 128, "batch": 2, "window": 32, "policy": "one-per-pack"}
    return write(card, model=IMAGE_MODEL, packing=packing, steps=None, epochs=1.0, save_every=2)


def test_broken_samples_are_logged_counted_and_reported(
    some_broken: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        run = train_here(some_broken, "data.max_broken=0.25")
    named = [record.getMessage() for record in caplog.records if "broken sample, replaced" in record.getMessage()]
    assert len(named) == 3  # of five
    assert all("mine, pairs-0.tar, row " in line and "undecodable picture" in line for line in named)
    assert "further broken samples are counted in the figures and listed in" in caplog.text
    assert "broken samples 1" in capsys.readouterr().out
    assert sum(losses(run, "data/broken").values()) == 5
    assert sum(losses(run, "data/samples").values()) == 20
    assert losses(run, "data/broken_share") == {step: count / 2 for step, count in losses(run, "data/broken").items()}
    page = report_of_run(run)
    assert re.search(r"5 of 20 \(25.0\s%\)", page)
    assert re.search(r"5 samples: undecodable picture.*; the first is mine, pairs-0.tar, row ", page)


def test_the_report_counts_a_broken_sample_once_over_resumes_and_apart_from_validation(
    tmp_path: Path, some_broken: Path
) -> None:
    (tmp_path / "held_out").mkdir()
    held_out = write_source(tmp_path / "held_out", "pairs", rows=6, shards=1, broken=[1, 2])
    changes = ["data.max_broken=1", f"data.validation={{held_out: {{card: {held_out}}}}}", "validate_every=2"]
    run = train_here(some_broken, *changes)
    again = fork_run(run, tmp_path / "again", step=4)
    train_here(some_broken, *changes, f"run={again}")
    for folder in (run, again):
        counts = [(reason.split(":")[0], count) for reason, count, _ in History.read(Stage("a", folder)).reasons]
        assert counts == [("undecodable picture", 5), ("validation", 2)]


def test_a_run_with_more_broken_samples_than_allowed_does_not_end_well_however_short(some_broken: Path) -> None:
    with pytest.raises(
        RunError, match=r"5 of 20 samples of this stage were broken, and data\.max_broken allows 0\.2 of 20"
    ):
        train_here(some_broken, "data.max_broken=0.2")


def test_a_share_that_is_met_exactly_is_allowed(tmp_path: Path) -> None:
    for broken in range(101):
        options = DataOptions({}, max_broken=float(f"0.{broken:02d}") if broken < 100 else 1.0, max_broken_after=0)
        Ledger(tmp_path, options).count(Tally(100, broken))
        with pytest.raises(RunError, match="samples of this stage were broken"):
            Ledger(tmp_path, replace(options, max_broken=max(0.0, options.max_broken - 1e-9))).count(
                Tally(100, broken + 1)
            )


def test_the_share_is_of_a_stated_number_of_samples_at_first(some_broken: Path) -> None:
    with pytest.raises(RunError, match=r"1 of \d+ samples .* allows 0\.009 of 100\."):
        train_here(some_broken, "data.max_broken=0.009", "data.max_broken_after=100")


def test_stopping_and_resuming_forgives_nothing(some_broken: Path) -> None:
    """Counted are the samples of the stage, and not those since the command was repeated."""
    with pytest.raises(RunError, match=r"data\.max_broken allows 0\.01 of 300\."):
        train_here(some_broken, "data.max_broken=0.01", "data.max_broken_after=300")
    with pytest.raises(RunError, match=r"[45] of 1\d samples .* allows 0\.01 of 300\."):
        train_here(some_broken, "data.max_broken=0.01", "data.max_broken_after=300")


@pytest.mark.parametrize("end", ["epochs: 1.0", "steps: 10"])
def test_a_stage_that_did_not_end_well_is_not_stepped_over_when_the_command_is_repeated(
    some_broken: Path, end: str
) -> None:
    stages = ("epochs=null", f"stages=[{{{end}}}, {{steps: 2, data: {{max_broken: 1.0}}}}]")
    for _ in range(2):
        with pytest.raises(RunError, match=r"5 of 20 samples of this stage were broken, .* allows 0\.2 of 20"):
            train_here(some_broken, "data.max_broken=0.2", *stages)
    run = train_here(some_broken, "data.max_broken=0.25", *stages)
    assert max(losses(run, "data/samples")) == 12
