"""Whatever the lengths, limits, weights, policies and worlds: samples come as often as asked and fit where they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lengths import mixed_lengths
from benchmarks.plan import first_fit, planned
from mm.packing.balance import deal
from mm.packing.fit import POLICIES
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.source import DROPPED, FILTERED, Rows, Source

FLOPS = 1e9


class Case(NamedTuple):
    """Rows of some sources, how they are to be packed, and how often they are to be seen."""

    sources: list[Rows]
    options: PackingOptions
    epochs: list[float]
    seed: int

    def plan(self, folder: Path, weights: list[float] | None = None) -> Plan:
        sources = [
            Source.of_rows(str(number), rows, np.ones(1), "drawn", epochs=epochs, weight=weight)
            for number, (rows, epochs, weight) in enumerate(
                zip(self.sources, self.epochs, weights or [None] * len(self.epochs), strict=True)
            )
        ]
        return Plan.open(folder, sources, self.options, self.seed)

    def usable(self, source: int) -> np.ndarray:
        """(n,) bool, the rows that fit a pack, whole or cut after their last picture."""
        rows, capacity = self.sources[source], self.options.capacity
        length, end = rows.tokens[:, 0], rows.media_end[:, 0] if rows.media_end is not None else 0
        fits = (length <= capacity) | ((self.options.too_long == "truncate") & (np.asarray(end) < capacity))
        within = rows.counts[:, 0] <= self.options.limits.get("image", 10**6)
        return (length > 0) & fits & within & (rows.excluded == 0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    capacity = draw(st.integers(4, 64))
    sources = []
    for _ in range(draw(st.integers(1, 3))):
        shards = random.integers(0, 25, draw(st.integers(1, 5)))
        shards[0] += 2  # half an epoch of one row is nothing, see below
        rows = int(shards.sum())
        images = random.integers(0, 4, rows)
        media_end = np.where(images > 0, images * random.integers(1, 9, rows) + random.integers(0, 5, rows), 0)
        tokens = np.where(random.random(rows) < 0.05, 0, media_end + random.integers(1, capacity, rows))
        excluded = random.choice([0, DROPPED, FILTERED], rows, p=[0.9, 0.05, 0.05])
        tokens[0], images[0], media_end[0], excluded[0] = 1, 0, 0, 0  # of every source something can be used
        counts = np.zeros((rows, 3), np.int32)
        counts[:, 0] = images
        flops = images * FLOPS
        sources.append(
            Rows(
                shards=shards,
                tokens=tokens[:, None].astype(np.int32),
                counts=counts,
                media_end=media_end[:, None].astype(np.int32),
                media_flops=flops,
                excluded=excluded.astype(np.uint8),
            )
        )
    options = PackingOptions(
        capacity=capacity,
        limits=draw(st.sampled_from([{}, {"image": 2}, {"image": 5}])),
        batch=12,
        window=draw(st.integers(1, 12)),
        alike=draw(st.integers(1, 9)),
        shuffle_shards=draw(st.integers(1, 4)),
        too_long=draw(st.sampled_from(["drop", "truncate"])),
        policy=draw(st.sampled_from(sorted(POLICIES))),
    )
    epochs = [draw(st.sampled_from([1.0, 2.0, 0.5, 1.5])) for _ in sources]
    return Case(sources, options, epochs, draw(st.integers(0, 99)))


def test_a_share_of_an_epoch_that_holds_no_row_is_refused(tmp_path: Path) -> None:
    rows = Rows(np.array([1]), np.ones((1, 1), np.int32), np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match="all sources end before they start: raise their epochs"):
        Case([rows], PackingOptions(capacity=4), [0.5], 0).plan(tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_one_usable_row_of_many_is_seen_in_every_epoch_wherever_its_shard_comes(tmp_path: Path, seed: int) -> None:
    tokens = np.full((9, 1), 99, np.int32)
    tokens[4] = 1
    rows = Rows(np.array([3, 3, 3]), tokens, np.zeros((9, 3), np.int32))
    plan = Case([rows], PackingOptions(capacity=4, batch=1, window=1, shuffle_shards=1), [6.0], seed).plan(tmp_path)
    assert sum(1 for pack in range(plan.total_packs() or 0) for _ in plan.pack(pack).samples()) == 6


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_every_usable_row_is_seen_as_often_as_asked_and_every_other_is_counted(tmp_path_factory, case):
    plan = case.plan(tmp_path_factory.mktemp("plan"))
    packs = plan.total_packs() or 0
    seen = Counter((one.source, one.shard, one.row) for pack in range(packs) for one in plan.pack(pack).samples())
    for number, (rows, epochs) in enumerate(zip(case.sources, case.epochs, strict=True)):
        usable = case.usable(number)
        shard = np.repeat(np.arange(len(rows.shards)), rows.shards)
        row = np.arange(len(shard)) - np.repeat(rows.starts[:-1], rows.shards)
        times = np.array([seen[number, *place] for place in zip(shard.tolist(), row.tolist(), strict=True)])
        assert not times[~usable].any()
        assert set(times[usable].tolist()) <= {int(epochs), int(np.ceil(epochs))}
        found = plan.statistics().sources[str(number)]
        assert found.samples == times.sum()
        assert found.samples + sum(found.dropped.values()) == round(epochs * len(usable))


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_no_pack_is_over_a_limit_and_no_picture_is_cut(tmp_path_factory, case):
    plan = case.plan(tmp_path_factory.mktemp("plan"))
    for number in range(plan.total_packs() or 0):
        pack = plan.pack(number)
        assert 0 < pack.length.sum() <= case.options.capacity
        images = 0
        for one in pack.samples():
            rows = case.sources[one.source]
            place = rows.starts[one.shard] + one.row
            assert rows.media_end is not None
            assert rows.media_end[place, 0] <= one.length <= rows.tokens[place, 0]
            assert one.truncated == (one.length < rows.tokens[place, 0])
            images += rows.counts[place, 0]
        assert images <= case.options.limits.get("image", images)
        assert plan.costs([number])[0].tolist() == [images * FLOPS, pack.length.sum()]


@given(case=cases(), weights=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_weighted_source_gives_no_row_again_before_it_has_given_all(tmp_path_factory, case, weights):
    case = case._replace(epochs=[5.0] * len(case.sources))
    plan = case.plan(tmp_path_factory.mktemp("plan"), weights[: len(case.sources)])
    plan.ensure(60)
    seen: Counter[tuple[int, int, int]] = Counter()
    for pack in range(plan.planned):
        for one in plan.pack(pack).samples():
            seen[one.source, one.shard, one.row] += 1
            assert one.epoch < 5
    with np.load(sorted(plan.folder.glob("*.npz"))[-1]) as window:
        for one in window["carried"]:
            seen[int(one["source"]), int(one["shard"]), int(one["row"])] += 1
    for number in range(len(case.sources)):
        usable = int(case.usable(number).sum())
        times = [count for (source, *_), count in seen.items() if source == number]
        assert max(times, default=0) - (min(times) if len(times) == usable else 0) <= 1


@given(case=cases(), world=st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=60, deadline=None)
def test_a_global_batch_is_the_same_on_any_number_of_ranks(tmp_path_factory, case, world):
    plan = case.plan(tmp_path_factory.mktemp("plan"))
    for step in range(plan.total_steps() or 0):
        packs = np.array(plan.batch(step))
        dealt = packs[deal(plan.costs(packs.tolist()), world, case.seed)]
        assert dealt.shape == (12 // world, world)
        assert sorted(dealt.ravel().tolist()) == sorted(packs.tolist())


@pytest.mark.parametrize("limit", [None, 8, 16])
def test_a_plan_in_windows_needs_no_more_packs_than_first_fit_over_all_samples_at_once(limit):
    mixture = mixed_lengths(10_000)
    if limit is not None:
        mixture = mixture.where(mixture.images <= limit)
    limits = {} if limit is None else {"image": limit}
    packs, _ = planned(mixture.tokens, mixture.images, PackingOptions(capacity=4096, limits=limits, window=1024))
    assert packs <= first_fit(mixture, limit if limit is not None else 10**6)
