"""Shards indexed when the plan comes to them give the plan, batches and losses of shards indexed before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mm.configure import RecipeError
from mm.data.card import Card
from mm.data.drops import drop
from mm.data.index import IndexingError, SplitSamples, index_card
from mm.data.shards import ShardChanged
from mm.packing.plan import Plan, PlanChanged
from mm.packing.source import Source
from mm.packing.windows import PlanReader
from mm.train.recipe import Recipe
from mm.train.stages import open_stages
from tests.processes import wait_until
from tests.shard_files import write_card, write_tar
from tests.small_world import losses, seen, train_here, train_together, words, write_recipe, write_source
from tests.test_plan import OPTIONS, files, rows_of, source

WEIGHTS = {"weight": 1.0}
LAZY = "data.lazy=true"


@pytest.fixture
def lazy(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A recipe of 6 steps over 8 shards of pictures, of which a window takes two, with an index of its own."""
    card = write_source(tmp_path, "pairs", rows=48, shards=8)
    (tmp_path / "held").mkdir()
    held_out = write_source(tmp_path / "held", "text", rows=4, shards=1)
    return write_recipe(
        tmp_path,
        {"pairs": card, "text": held_out, "held_out": held_out},
        tokenizer_folder,
        ["pairs"],
        steps=6,
        packing={"capacity": 128, "batch": 2, "window": 2, "shuffle_shards": 2},
        save_every=1,
    )


def indexed(recipe: Path) -> set[str]:
    """Shards of pictures whose index is on disk."""
    return {path.name[:7] for path in index_of(recipe).glob("pairs-*.parquet")}


def index_of(recipe: Path) -> Path:
    return recipe.parent / "held/cache/index"


def test_lazy_and_eager_plans_hold_the_same_packs(tmp_path: Path) -> None:
    counted, uncounted = source(), source()
    lazy = Source("captions", counted.shards, uncounted.load, counted.choice_probabilities, "made up", None, **WEIGHTS)
    eager = Source.of_rows("captions", rows_of(counted), counted.choice_probabilities, "made up", **WEIGHTS)
    for folder, one in (("lazy", lazy), ("eager", eager)):
        Plan.open(tmp_path / folder, [one], OPTIONS, seed=0).ensure(200)
    windows = [
        {name: data for name, data in files(tmp_path / folder).items() if name.endswith("npz")}
        for folder in ("lazy", "eager")
    ]
    assert windows[0] == windows[1]


def test_only_the_shards_of_the_first_window_are_indexed_before_training(lazy: Path, tmp_path: Path) -> None:
    (stage,) = open_stages(Recipe.load(lazy, [LAZY]), tmp_path / "looked at")
    assert stage.end == 6
    assert len(indexed(lazy)) == 2
    (stage,) = open_stages(Recipe.load(lazy), tmp_path / "looked at anew")
    assert len(indexed(lazy)) == 8


def test_a_lazy_run_trains_as_an_eager_one(lazy: Path, tmp_path: Path) -> None:
    later = train_here(lazy, LAZY, f"run={tmp_path / 'lazy'}")
    assert 2 < len(indexed(lazy)) <= 8
    before = train_here(lazy, f"run={tmp_path / 'eager'}")
    assert len(indexed(lazy)) == 8
    assert seen(later) == seen(before)
    assert losses(later) == losses(before)


@pytest.mark.slow
def test_a_lazy_run_on_two_processes_sees_what_one_sees(lazy: Path, tmp_path: Path) -> None:
    train_together(tmp_path, 2, [[str(lazy), LAZY, f"run={tmp_path / 'two'}"]])
    one = train_here(lazy, LAZY, f"run={tmp_path / 'one'}")
    assert seen(tmp_path / "two") == seen(one)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)


def test_packs_are_planned_ahead_in_the_background(tmp_path: Path) -> None:
    plan = Plan.open(tmp_path, [source()], OPTIONS, seed=0)
    plan.ensure_ahead(300)
    reader = PlanReader(tmp_path, 8)

    def planned() -> bool:
        reader.refresh()
        return reader.planned >= 300

    wait_until(planned)
    other = Plan.open(tmp_path.with_name("other"), [source()], OPTIONS, seed=0)
    other.ensure(300)
    assert reader.planned == other.planned
    assert [reader.pack(number).row.tolist() for number in range(300)] == [
        other.pack(number).row.tolist() for number in range(300)
    ]


def test_what_fails_in_the_background_is_met_by_who_needs_the_packs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = source()

    def load(shards):
        if 4 in shards:
            raise OSError("no route to host")
        return good.load(shards)

    plan = Plan.open(tmp_path, [Source("captions", 9, load, np.ones(1), "made up")], OPTIONS, seed=0)
    with pytest.raises(OSError, match="no route"):
        plan.ensure(10_000)
    known = plan.planned
    plan.ensure_ahead(10_000)
    with pytest.raises(OSError, match="no route"):
        plan.ensure(10_000)
    assert plan.planned == known > 0


def test_a_shard_that_was_replaced_and_indexed_anew_is_refused_where_it_was_planned(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{row:03d}.txt", words(row).encode()) for row in range(5)])
    card = Card.load(write_card(tmp_path, ["0.tar"], [{"text": "txt"}]))
    index = index_card(card, "train", tmp_path / "index", progress=False)
    stamp = index.shards[0].number
    samples = SplitSamples(card, "train", tmp_path / "index", card.shards("train"))
    assert samples.sample(0, 3, 0, stamp).key == "003"
    write_tar(tmp_path / "0.tar", [(f"{row:03d}.txt", words(row).encode()) for row in range(1, 6)])
    index_card(card, "train", tmp_path / "index", progress=False)
    anew = SplitSamples(card, "train", tmp_path / "index", card.shards("train"))
    assert anew.sample(0, 3).key == "004"
    with pytest.raises(ShardChanged, match="indexed anew since this sample was planned"):
        anew.sample(0, 3, 0, stamp)


def test_samples_index_a_shard_that_nobody_has_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{row:03d}.txt", words(row).encode()) for row in range(5)])
    card = Card.load(write_card(tmp_path, ["0.tar"], [{"text": "txt"}]))
    (tmp_path / "index").mkdir()
    samples = SplitSamples(card, "train", tmp_path / "index", card.shards("train"))
    assert samples.sample(0, 2).key == "002"
    assert [entry.rows for entry in samples.known] == [5]


def test_a_dropped_sample_is_another_lazy_plan(lazy: Path) -> None:
    train_here(lazy, LAZY, "steps=1")
    card = Card.load(lazy.parent / "pairs.yaml")
    drop(index_card(card, "train", index_of(lazy), progress=False), ["5"])
    with pytest.raises(PlanChanged, match=r"pairs\.dropped: None → '1 samples \("):
        train_here(lazy, LAZY, "steps=2")


def test_a_filter_leaves_rows_out_of_lazy_plans_too(lazy: Path, tmp_path: Path) -> None:
    where = "data.sources.pairs.where='characters>20'"
    (stage,) = open_stages(Recipe.load(lazy, [LAZY, where]), tmp_path / "run")
    stage.data.plan.ensure(200)
    index = index_card(Card.load(lazy.parent / "pairs.yaml"), "train", index_of(lazy), progress=False)
    long = {divmod(row, 6) for row in np.flatnonzero(index.characters[:, 0] > 20).tolist()}
    planned = {(one.shard, one.row) for pack in range(200) for one in stage.data.plan.pack(pack).samples()}
    assert planned == long
    assert 0 < len(long) < 48


def test_what_cannot_be_known_without_an_index_is_asked_for(lazy: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.lazy: .* say `steps`"):
        Recipe.load(lazy, [LAZY, "steps=null", "epochs=1"])
    with pytest.raises(ValueError, match="ask for whole epochs"):
        list(open_stages(Recipe.load(lazy, [LAZY, "data.sources.pairs.epochs=0.5"]), tmp_path / "half"))
    text = f"data.sources.text={{card: {lazy.parent / 'held' / 'text.yaml'}}}"
    with pytest.raises(ValueError, match="give every source a weight"):
        list(open_stages(Recipe.load(lazy, [LAZY, text]), tmp_path / "two"))


def test_shards_without_any_sample_are_passed_over_on_the_way_and_refused_before(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "broken").mkdir()
    card = write_source(tmp_path, "text", rows=20, shards=5)
    for number in (0, 3):
        write_tar(tmp_path / f"text-{number}.tar", [("a.png", b"no picture and no text")])
    recipe = write_recipe(tmp_path, {"text": card, "held_out": card}, tokenizer_folder, ["text"], steps=3)
    run = train_here(recipe, LAZY, "packing.shuffle_shards=1", "packing.window=1", "data.validation={}")
    assert list(losses(run)) == [1, 2, 3]
    for number in (1, 2, 4):
        write_tar(tmp_path / f"text-{number}.tar", [("a.png", b"no picture and no text")])
    with pytest.raises(IndexingError, match="no usable sample"):
        train_here(recipe, f"run={tmp_path / 'other'}")
    with pytest.raises(ValueError, match="none of its 0 rows can be used"):
        train_here(recipe, LAZY, f"run={tmp_path / 'another'}")


def test_the_state_of_the_data_in_a_checkpoint_is_less_than_a_kilobyte_with_forty_sources(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    card = write_source(tmp_path, "text", rows=8)
    cards = {f"a-source-with-a-rather-long-name-{number}": card for number in range(40)}
    recipe = write_recipe(
        tmp_path,
        cards | {"text": card, "held_out": card},
        tokenizer_folder,
        list(cards),
        steps=None,
        stages=[{"steps": 1}, {"steps": 1}],
    )
    run = train_here(recipe)
    position = run / "checkpoints/step-00000002/position.json"
    assert json.loads(position.read_text())["finished"] == [[1, 4]]
    assert position.stat().st_size < 1024
