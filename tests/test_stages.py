"""Stages: one run under several recipes, each consuming what the ones before have not seen."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mm.configure import RecipeError
from mm.packing.plan import PlanChanged
from mm.packing.streams import Cursor
from mm.train import checkpoint
from mm.train.checkpoint import Finished
from mm.train.export import load_trained
from mm.train.loop import RunError
from mm.train.preview import planned_at, preview
from mm.train.reading import Reader
from mm.train.recipe import Recipe
from mm.train.stages import open_stages, read_to
from tests.small_world import fork_run, losses, seen, train_here, train_together, write_recipe, write_source

pytestmark = pytest.mark.timeout(600)

FREEZE_DECODER = [{"match": "^decoder", "freeze": True}]
STAGES: list[dict[str, Any]] = [
    {"steps": 3, "optim": {"parts": FREEZE_DECODER}, "packing": {"window": 2}},
    {"steps": 3, "packing": {"capacity": 160, "window": 2}, "optim": {"lr": 1e-3}},
]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    """A recipe of two stages over pairs and text, batches of two packs."""
    return write_recipe(
        tmp_path_factory.mktemp("staged"),
        corpus,
        tokenizer_folder,
        ["pairs", "text"],
        steps=None,
        stages=STAGES,
        packing={"capacity": 128, "batch": 2},
        save_every=1,
    )


@pytest.fixture(scope="module")
def whole(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of it, in one go."""
    return train_here(staged, f"run={tmp_path_factory.mktemp('whole')}")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}"
    entries = Reader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size)
        for name, entry in entries.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    load_checkpoint(state, checkpoint_id=path, no_dist=True)
    return state


def test_the_steps_of_a_run_count_on_over_its_stages(whole: Path) -> None:
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    position = checkpoint.read_position(checkpoint.find(whole))
    assert (position.step, position.packs, position.finished) == (6, 6, ((3, 6),))
    assert position.tokens > checkpoint.read_position(whole / "checkpoints" / "step-00000003").tokens > 0


def test_each_stage_has_its_own_freezing_and_rate(whole: Path) -> None:
    first, third, fourth = (weights(whole, step) for step in (1, 3, 4))
    for name in first:
        if name.startswith("model.decoder."):
            assert torch.equal(first[name], third[name])
    assert not torch.equal(third["model.decoder.embedding.weight"], fourth["model.decoder.embedding.weight"])
    rates = losses(whole, "learning_rate")
    assert rates[3] == pytest.approx(2e-3)
    assert rates[4] == pytest.approx(1e-3)


def test_a_stage_starts_where_the_one_before_has_read_to(staged: Path, tmp_path: Path) -> None:
    first, second = open_stages(Recipe.load(staged), tmp_path)
    rows: Counter[tuple[int, int, int]] = Counter()
    for stage in (first, second):
        stage.data.plan.ensure(stage.packs_at(stage.end))
        for pack in range(stage.packs_at(stage.end)):
            rows.update((one.source, one.shard, one.row, one.epoch) for one in stage.data.plan.pack(pack).samples())
    assert set(rows.values()) == {1}
    assert first.data.plan.folder.name == "plan"
    read = first.data.plan.read_to(6)
    assert all(cursor > Cursor() for cursor, *_ in read.values())
    assert {name: one.cursor for name, one in second.data.plan.read_to(0).items()} == {
        name: one.cursor for name, one in read.items()
    }


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumed_within_a_stage_or_between_two_is_the_same_run(
    staged: Path, whole: Path, step: int, tmp_path: Path
) -> None:
    forked = fork_run(whole, tmp_path / "forked", step)
    train_here(staged, f"run={forked}")
    assert losses(forked) == losses(whole)
    assert seen(forked) == seen(whole)
    first, second = weights(whole, 6), weights(forked, 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_and_two_see_the_same_in_both_stages(staged: Path, whole: Path, tmp_path: Path) -> None:
    train_together(tmp_path, 2, [[str(staged), f"run={tmp_path / 'two'}"]])
    assert len(list((tmp_path / "two" / "seen").iterdir())) == 2
    assert seen(tmp_path / "two") == seen(whole)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)


def test_a_run_may_be_forked_into_a_stage_with_another_source_and_then_sees_only_what_is_new(
    staged: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    run = f"run={tmp_path / 'run'}"
    plain = ["stages=[{steps: 3, packing: {window: 2}}]", run]
    train_here(staged, *plain)
    added = f"{{steps: 2, packing: {{window: 2}}, data: {{sources: {{points: {{card: {corpus['points']}}}}}}}}}"
    with pytest.raises(PlanChanged, match="sources"):
        train_here(staged, f"stages=[{added}]", run, "stages.0.steps=5")
    train_here(staged, f"stages=[{{steps: 3, packing: {{window: 2}}}}, {added}]", run)
    position = checkpoint.read_position(checkpoint.find(tmp_path / "run"))
    assert (position.step, position.finished) == (5, ((3, 6),))
    read = read_to(tmp_path / "run", (*position.finished, Finished(position.step, position.packs)))
    assert set(read) == {"pairs", "text", "points"}


def test_data_that_changed_is_refused_in_a_stage_and_welcome_in_the_next(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = write_source(tmp_path, "text", rows=24)
    recipe = write_recipe(
        tmp_path, corpus | {"text": card}, tokenizer_folder, ["text"], steps=None, stages=[{"steps": 2}]
    )
    train_here(recipe)
    write_source(tmp_path, "text", rows=22)
    with pytest.raises(PlanChanged, match=r"text\.fingerprint"):
        train_here(recipe, "stages=[{steps: 3}]")
    run = train_here(recipe, "stages=[{steps: 2}, {steps: 1}]")
    assert list(losses(run)) == [1, 2, 3]
    assert "text has 22 rows and had 24 rows in the stage before" in caplog.text


def test_an_export_holds_the_recipe_of_the_stage_that_it_ended_in(whole: Path) -> None:
    assert load_trained(whole).recipe.packing.capacity == 160
    assert load_trained(whole / "checkpoints" / "step-00000002").recipe.packing.capacity == 128


def test_plan_and_inspect_show_every_stage(staged: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(staged, [f"run={tmp_path / 'run'}"])
    assert len(list(preview(recipe))) == 2 * 4
    data, step = planned_at(recipe, 4)
    assert (data.plan.options.capacity, step) == (160, 1)
    with pytest.raises(RecipeError, match="ends after 6 steps"):
        planned_at(recipe, 6)


def test_a_stage_or_an_override_may_leave_a_source_out(staged: Path) -> None:
    changes = "stages=[{steps: 3}, {steps: 1, data: {sources: {text: null}}}]"
    first, second = Recipe.load(staged, [changes]).stage_recipes()
    assert (set(first.data.sources), set(second.data.sources)) == ({"pairs", "text"}, {"pairs"})
    assert set(Recipe.load(staged, ["data.sources.text=null"]).data.sources) == {"pairs"}
    with pytest.raises(RecipeError, match="nowhere"):
        Recipe.load(staged, ["data.sources.nowhere=null"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["steps=4"], "each of them says its `steps` or `epochs`"),
        (["stages=[{steps: 3}, {optim: {lr: 1}}]"], r"stages\.1: .*exactly one of `steps` and `epochs`"),
        (["stages=[{steps: 3, optim: {rate: 1}}]"], r"stages\.0: .*rate"),
        (["stages=[{steps: 3, run: elsewhere}]"], r"stages\.0: run cannot differ"),
        (["stages=[{steps: 3, stages: []}]"], r"stages\.0: stages cannot differ"),
        (["stages=[]"], "exactly one of `steps` and `epochs`"),
    ],
)
def test_stages_that_make_no_sense_are_refused(staged: Path, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.load(staged, changes)


def test_a_run_beyond_the_end_of_its_stage_is_refused(staged: Path, whole: Path, tmp_path: Path) -> None:
    forked = fork_run(whole, tmp_path / "forked", 3)
    with pytest.raises(RunError, match="at step 3, beyond the end of stage 0 at step 2"):
        train_here(staged, f"run={forked}", "stages.0.steps=2")
    with pytest.raises(RunError, match="finished 1 stages and the recipe has 1"):
        train_here(staged, f"run={whole}", f"stages=[{json.dumps(STAGES[0])}]")
