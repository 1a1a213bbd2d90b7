"""Mixtures: measured shares are those of the recipe, in tokens, samples or epochs; filters and drops are counted."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mm.configure import RecipeError
from mm.data.card import Card
from mm.data.drops import drop
from mm.data.index import index_card
from mm.data.where import WhereError
from mm.packing.options import PackingOptions
from mm.packing.plan import SKEW, SKEW_TOKENS, Plan, PlanChanged
from mm.packing.source import DROPPED, EXCLUSIONS, FILTERED, MISSING, Source
from mm.train.preview import preview
from mm.train.recipe import Recipe
from tests.small_world import train_here, write_recipe, write_source
from tests.test_plan import OPTIONS, seen, source

TENTH = 0.001
"""A tenth of a percentage point."""


def of_lengths(name: str, lengths: np.ndarray, **options) -> Source:
    """A source of text of these lengths."""
    return source(
        name,
        len(lengths),
        shards=1,
        columns={
            "tokens": lengths[:, None].astype(np.int32),
            "counts": np.zeros((len(lengths), 3), np.int16),
            "media_end": None,
            "media_tokens": None,
            "media_flops": None,
        },
        **options,
    )


def by_window(plan: Plan, windows: int, figure: str = "tokens") -> np.ndarray:
    """(windows, S) what each window holds of each source."""
    totals = [[0] * len(plan.sources)]
    for _ in range(windows):
        plan.ensure(plan.planned + 1)
        totals.append([getattr(part, figure) for part in plan.statistics().sources.values()])
    return np.diff(np.array(totals, np.float64), axis=0)


def worst_deviation(amounts: np.ndarray, weights: np.ndarray) -> float:
    """Largest distance of a share from its weight, in any window and after any number of them."""
    asked = weights / weights.sum()
    each = amounts / amounts.sum(axis=1, keepdims=True) - asked
    so_far = amounts.cumsum(axis=0) / amounts.sum(axis=1).cumsum()[:, None] - asked
    return float(np.abs([each, so_far]).max())


# -------------------------------------------------------------------------------------------------------------- shares


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
    longest=st.integers(8, 512),
    window=st.integers(2, 40),
    unit=st.sampled_from(["tokens", "samples"]),
    seed=st.integers(0, 99),
)
def test_every_source_gets_its_quota_to_half_a_sample_and_errors_do_not_add_up(
    tmp_path_factory, weights, longest, window, unit, seed
):
    draw = np.random.default_rng(seed)
    sources = [
        of_lengths(str(number), draw.integers(1, longest + 1, 200), weight=weight)
        for number, weight in enumerate(weights)
    ]
    options = PackingOptions(capacity=512, window=window)
    plan = Plan.open(tmp_path_factory.mktemp("plan"), sources, options, seed, unit=unit)
    windows = 12
    while len(list(plan.folder.glob("*.npz"))) < windows:
        plan.ensure(plan.planned + 1)
    with np.load(sorted(plan.folder.glob("*.npz"))[windows - 1]) as state:
        given_out, waiting = state[unit], state["carried"]
    for number, weight in enumerate(weights):
        mine = waiting[waiting["source"] == number]
        taken = given_out[number] + (mine["length"].sum() if unit == "tokens" else len(mine))
        quota = windows * plan._budget * weight / sum(weights)
        half = longest / 2 if unit == "tokens" else 0.5
        assert abs(taken - quota) <= half + 1


@settings(max_examples=6, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.floats(0.01, 1.0), st.integers(150, 1500), st.floats(1.0, 3.0)), min_size=2, max_size=5
    ),
    capacity=st.sampled_from([1500, 4096]),
    seed=st.integers(0, 99),
)
def test_shares_are_those_of_the_recipe_after_every_window_of_five_million_tokens(
    tmp_path_factory, parts, capacity, seed
):
    draw = np.random.default_rng(seed)
    sources = [
        of_lengths(str(number), draw.integers(least, min(int(least * spread), 1500) + 1, 3000), weight=weight)
        for number, (weight, least, spread) in enumerate(parts)
    ]
    options = PackingOptions(capacity=capacity, window=math.ceil(5.2e6 / capacity))
    plan = Plan.open(tmp_path_factory.mktemp("plan"), sources, options, seed)
    amounts = by_window(plan, 3)
    assert (amounts.sum(axis=1) > 5e6).all()
    assert worst_deviation(amounts, np.array([weight for weight, *_ in parts])) < TENTH


def test_shares_hold_over_a_hundred_million_tokens_of_awkward_lengths(tmp_path):
    # Long documents leave packs half empty, so what waits for the next window would be one source's alone.
    draw = np.random.default_rng(0)
    weights = np.array([0.5, 0.3, 0.17, 0.03])
    ranges = ((2300, 2700), (2100, 2200), (20, 400), (3000, 4097))
    sources = [
        of_lengths(str(number), draw.integers(*ends, 20_000), weight=weight)
        for number, (ends, weight) in enumerate(zip(ranges, weights, strict=True))
    ]
    plan = Plan.open(tmp_path, sources, PackingOptions(capacity=4096, window=1250), seed=0)
    amounts = by_window(plan, 20)
    assert amounts.sum() > 1e8
    assert worst_deviation(amounts, weights) < TENTH


def test_what_waits_for_the_next_window_moves_no_share_by_more_than_the_skew(tmp_path):
    weights = np.array([0.6, 0.4])
    draw = np.random.default_rng(1)
    sources = [of_lengths(str(n), draw.integers(300, 400, 5000), weight=weight) for n, weight in enumerate(weights)]
    plan = Plan.open(tmp_path, sources, PackingOptions(capacity=512, window=4096), seed=0)
    plan.ensure(1)
    with np.load(next(tmp_path.glob("*.npz"))) as state:
        carried = state["carried"]
    amounts = np.array([carried["length"][carried["source"] == number].sum() for number in (0, 1)])
    assert amounts.sum() > 0
    assert np.abs(amounts - weights * amounts.sum()).max() <= SKEW * SKEW_TOKENS


def test_weights_in_samples_are_shares_of_samples(tmp_path):
    draw = np.random.default_rng(0)
    sources = [
        of_lengths("short", draw.integers(5, 20, 3000), weight=1),
        of_lengths("long", draw.integers(200, 500, 3000), weight=3),
    ]
    plan = Plan.open(tmp_path, sources, PackingOptions(capacity=512, window=10_000), seed=0, unit="samples")
    samples = by_window(plan, 4, "samples")
    assert worst_deviation(samples, np.array([1, 3])) < TENTH
    statistics = plan.statistics()
    assert statistics.sources["long"].asked == pytest.approx(0.75)
    assert statistics.sources["long"].sample_share == pytest.approx(0.75, abs=TENTH)
    assert statistics.sources["long"].share > 0.98
    assert statistics.tokens == pytest.approx(4 * 10_000 * 512, rel=0.01)  # a window is as large as one of tokens


def test_weights_in_epochs_are_passes_over_a_source(tmp_path):
    sources = [source("twice", 900, weight=2), source("once", 300, shards=3, seed=1, weight=1)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0, unit="epochs")
    while plan.statistics().sources["once"].epochs < 4:
        plan.ensure(plan.planned + 1)
    epochs = {name: part.epochs for name, part in plan.statistics().sources.items()}
    assert epochs["twice"] == pytest.approx(2 * epochs["once"], rel=0.02)


def test_epochs_without_weights_sample_up_and_down(tmp_path):
    sources = [source("up", 300, shards=3, epochs=2), source("down", 900, seed=1, epochs=0.5)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0)
    plan.total_packs()
    samples = seen(plan)
    assert sorted(row for number, _, row in samples if number == 0) == sorted(2 * [*range(300)])
    down = [row for number, _, row in samples if number == 1]
    assert len(down) == len(set(down)) == 450


def test_a_mixture_in_samples_ends_with_the_source_that_runs_dry_and_holds_to_its_end(tmp_path):
    sources = [source("scarce", 90, epochs=1, weight=1), source("plenty", 900, seed=1, weight=2)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0, unit="samples")
    plan.total_packs()
    statistics = plan.statistics()
    assert statistics.ended_by == "scarce"
    assert statistics.sources["scarce"].samples == 90
    assert abs(statistics.sources["plenty"].samples - 180) <= 1


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_a_share_is_refused(weight):
    with pytest.raises(ValueError, match="source captions: weight must be a number greater than 0"):
        source(weight=weight)


def test_a_tiny_weight_is_met_in_the_long_run(tmp_path):
    sources = [source(weight=1.0), of_lengths("rare", np.full(40, 100), weight=0.002)]
    plan = Plan.open(tmp_path, sources, PackingOptions(capacity=512, window=8), seed=0)
    while plan.statistics().tokens < 3e5:
        plan.ensure(plan.planned + 1)
    assert plan.statistics().sources["rare"].tokens == pytest.approx(3e5 * 0.002 / 1.002, abs=200)


# ------------------------------------------------------------------------------------------------- what is left out


def test_excluded_rows_are_never_seen_and_counted_by_reason_once_an_epoch(tmp_path):
    excluded = np.zeros(900, np.uint8)
    excluded[:10], excluded[10:30], excluded[30:60] = DROPPED, FILTERED, MISSING
    plan = Plan.open(tmp_path, [source(columns={"excluded": excluded})], OPTIONS, seed=0, epochs=2)
    plan.total_packs()
    dropped = plan.statistics().sources["captions"].dropped
    assert [dropped[reason] for reason in EXCLUSIONS] == [20, 40, 60]
    assert sorted(row for _, _, row in seen(plan)) == sorted(2 * [*range(60, 900)])


def test_a_source_that_is_excluded_whole_is_refused_with_the_reasons(tmp_path):
    excluded = np.full(900, FILTERED, np.uint8)
    excluded[:4] = DROPPED
    message = "none of its 900 rows can be used: 4 dropped by `mm data drop`, 896 filtered out by `where`"
    with pytest.raises(ValueError, match=message):
        Plan.open(tmp_path, [source(columns={"excluded": excluded})], OPTIONS, seed=0)
    with pytest.raises(ValueError, match=r"excluded is for \(3,\)"):
        source(columns={"excluded": np.zeros(3, np.uint8)})


def test_a_changed_unit_or_selection_is_another_plan(tmp_path):
    Plan.open(tmp_path, [source(weight=1, selection={"where": "width > 3"})], OPTIONS, seed=0)
    with pytest.raises(PlanChanged, match=r"unit: 'tokens' → 'samples'"):
        Plan.open(tmp_path, [source(weight=1, selection={"where": "width > 3"})], OPTIONS, seed=0, unit="samples")
    with pytest.raises(PlanChanged, match=r"captions\.where: 'width > 3' → None"):
        Plan.open(tmp_path, [source(weight=1)], OPTIONS, seed=0)
    with pytest.raises(ValueError, match="weights are in tokens, samples, epochs, not in 'packs'"):
        Plan.open(tmp_path, [source(weight=1)], OPTIONS, seed=0, unit="packs")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------- whole recipes


@pytest.fixture
def mixed(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A recipe of pairs and text, 24 rows each, with cards of its own."""
    cards = {name: write_source(tmp_path, name, rows=24) for name in ("pairs", "text")}
    return write_recipe(tmp_path, {**cards, "held_out": cards["pairs"]}, tokenizer_folder, ["pairs", "text"], steps=1)


def shown(recipe: Recipe) -> str:
    written = io.StringIO()
    for table in preview(recipe):
        Console(file=written, width=200).print(table)
    return written.getvalue()


def test_mm_plan_shows_what_was_asked_what_came_and_what_was_left_out(mixed: Path) -> None:
    drop(index_card(Card.load(mixed.parent / "pairs.yaml"), "train", mixed.parent / "cache" / "index"), ["5", "6", "7"])
    changes = [
        "data.sources.pairs.weight=0.25",
        "data.sources.text.weight=0.75",
        "data.sources.text.where=characters > 20",
    ]
    text = shown(Recipe.load(mixed, changes))
    assert "share of tokens" in text
    assert "75.00%" in text
    assert "share of samples" in shown(Recipe.load(mixed, [*changes, "data.unit=samples"]))
    lines = [line for line in text.splitlines() if "│" in line]
    assert any("pairs" in line and "dropped by `mm data drop`" in line for line in lines)
    assert any("text" in line and "filtered out by `where`" in line for line in lines)


def test_a_run_that_has_a_plan_refuses_another_selection_until_it_is_undone(mixed: Path) -> None:
    where = "data.sources.text.where={}".format
    run = train_here(mixed, where("characters > 20"))
    with pytest.raises(PlanChanged, match=r"text\.where: 'characters > 20' → 'characters > 22'"):
        train_here(mixed, where("characters > 22"))
    index = index_card(Card.load(mixed.parent / "pairs.yaml"), "train", mixed.parent / "cache" / "index")
    drop(index, ["000003"])
    with pytest.raises(PlanChanged, match=r"pairs\.dropped: None → '1 rows \("):
        train_here(mixed, where("characters > 20"))
    drop(index, ["000003"], undo=True)
    assert train_here(mixed, where("characters>20"), "steps=2") == run
    write_source(mixed.parent, "pairs", rows=26)
    with pytest.raises(PlanChanged, match=r"(?s)pairs\.fingerprint: .*pairs\.rows: 24 → 26"):
        train_here(mixed, where("characters > 20"), "steps=3")


def test_a_filter_that_selects_nothing_and_an_unknown_unit_are_refused(mixed: Path) -> None:
    with pytest.raises(WhereError, match=r"selects none of the 24 rows of text/train.*characters is"):
        shown(Recipe.load(mixed, ["data.sources.text.where=characters > 2000"]))
    with pytest.raises(RecipeError, match=r"data\.unit"):
        Recipe.load(mixed, ["data.unit=packs"])
