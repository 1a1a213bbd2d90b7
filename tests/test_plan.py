"""A plan is a function of (sources, options, seed), survives being killed, and counts every sample."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lengths import mixed_lengths
from mm.configure import load
from mm.packing.fit import POLICIES
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan, PlanChanged
from mm.packing.source import Rows, Source
from mm.packing.streams import Cursor
from mm.packing.windows import PackRows, PlanDamaged, PlanReader

ROOT = Path(__file__).parent.parent
OPTIONS = PackingOptions(capacity=512, limits={"image": 8}, batch=8, window=32, shuffle_shards=3)


def source(
    name: str = "captions",
    rows: int = 900,
    *,
    shards: int = 9,
    capacity: int = 512,
    seed: int = 0,
    columns: dict[str, np.ndarray | None] | None = None,
    **options,
) -> Source:
    """A source of mixed lengths with one choice of text, other `columns` in the place of some."""
    mixture = mixed_lengths(rows, capacity=capacity, seed=seed)
    counts = np.zeros((rows, 3), np.int16)
    counts[:, 0] = mixture.images
    media = np.zeros((rows, 3), np.int32)
    media[:, 0] = mixture.image_tokens
    values = {
        "shards": np.full(shards, rows // shards),
        "tokens": mixture.tokens[:, None].astype(np.int32),
        "counts": counts,
        "media_end": mixture.image_tokens[:, None].astype(np.int32),
        "media_tokens": media,
        "media_flops": mixture.image_tokens.astype(np.float64),
    }
    probabilities = options.pop("choice_probabilities", np.ones(1))
    return Source.of_rows(name, Rows(**(values | (columns or {}))), probabilities, f"{name}-{rows}-{seed}", **options)


def rows_of(source: Source) -> Rows:
    """All rows of a source."""
    return source.load(range(source.shards))


def numbers(plan: PlanReader, pack: PackRows) -> np.ndarray:
    """(k,) number of each sample among all rows of its source, whose shards are of equal size."""
    parts = json.loads((plan.folder / "plan.json").read_text())["parts"]
    sizes = np.array([parts[f"{name}.rows"] // parts[f"{name}.shards"] for name in parts["sources"]])
    return pack.shard * sizes[pack.source] + pack.row


def seen(plan: PlanReader, packs: int | None = None) -> list[tuple[int, int, int]]:
    """(source, epoch, row) of all samples of the first packs, in order."""
    samples = []
    for number in range(plan.planned if packs is None else packs):
        pack = plan.pack(number)
        samples.extend(zip(pack.source.tolist(), pack.epoch.tolist(), numbers(plan, pack).tolist(), strict=True))
    return samples


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npz", ".json")}


def test_every_row_is_seen_exactly_as_often_as_asked(tmp_path):
    plan = Plan.open(tmp_path, [source(), source("pages", 300, shards=3, seed=1)], OPTIONS, seed=0, epochs=2)
    plan.total_packs()
    expected = {
        (number, epoch, row) for number, rows in ((0, 900), (1, 300)) for epoch in (0, 1) for row in range(rows)
    }
    samples = seen(plan)
    assert len(samples) == len(expected)
    assert set(samples) == expected


def test_part_of_an_epoch_is_part_of_the_rows(tmp_path):
    plan = Plan.open(tmp_path, [source(epochs=1.5)], OPTIONS, seed=0)
    plan.total_packs()
    epochs = Counter(epoch for _, epoch, _ in seen(plan))
    assert epochs == {0: 900, 1: 450}
    assert len(set(seen(plan))) == 1350


def test_no_pack_is_over_capacity_or_limits(tmp_path):
    sources = [source(), source("pages", 300, shards=3, seed=1)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0, epochs=1)
    for number in range(plan.total_packs() or 0):
        pack = plan.pack(number)
        images = sum(
            rows_of(sources[owner]).counts[row, 0] for owner, row in zip(pack.source, numbers(plan, pack), strict=True)
        )
        assert 0 < pack.length.sum() <= 512
        assert images <= 8


def test_the_plan_depends_on_inputs_only(tmp_path):
    sources = [source(weight=1.0), source("pages", 300, shards=3, seed=1, weight=2.0)]
    whole = Plan.open(tmp_path / "whole", sources, OPTIONS, seed=3)
    whole.ensure(150)
    for packs in (1, 2, 40, 41, 150):
        Plan.open(tmp_path / "piecewise", sources, OPTIONS, seed=3).ensure(packs)
    assert files(tmp_path / "whole") == files(tmp_path / "piecewise")
    other = Plan.open(tmp_path / "other seed", sources, OPTIONS, seed=4)
    other.ensure(150)
    assert seen(other, 100) != seen(whole, 100)


def test_another_process_continues_with_the_same_bytes(tmp_path):
    script = "import sys; from tests.test_plan import *; long_plan(Path(sys.argv[1])).ensure(int(sys.argv[2]))"
    long_plan(tmp_path / "one").ensure(300)
    for packs in (50, 300):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "two"), str(packs)], check=True, cwd=ROOT)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_killed_planner_leaves_whole_windows_only(tmp_path):
    script = "import sys; from tests.test_plan import *; long_plan(Path(sys.argv[1])).ensure(10**9)"
    folder = tmp_path / "killed"
    for kill in range(3):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT)
        deadline = time.monotonic() + 60
        before = len(list(folder.glob("*.npz")))
        while len(list(folder.glob("*.npz"))) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.003 * (kill + 1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert seen(PlanReader(folder, 8))
    packs = PlanReader(folder, 8).planned
    plan = long_plan(folder)
    plan.ensure(packs + 100)
    untouched = long_plan(tmp_path / "untouched")
    untouched.ensure(packs + 100)
    assert files(folder) == files(tmp_path / "untouched")


def long_plan(folder: Path) -> Plan:
    """An endless plan of two sources, the same in every process."""
    return Plan.open(folder, [source(), source("pages", 300, shards=3, seed=1)], OPTIONS, seed=11)


def test_weights_are_shares_of_tokens_in_every_stretch(tmp_path):
    options = PackingOptions(capacity=4096, limits={"image": 16}, window=1300)
    sources = [
        source("captions", 30_000, shards=30, capacity=4096, weight=0.7),
        source("pages", 3000, shards=3, capacity=4096, seed=1, weight=0.25),
        source("rare", 12, shards=1, capacity=4096, seed=2, weight=0.05),
    ]
    plan = Plan.open(tmp_path, sources, options, seed=0)
    for windows in (1, 2, 3):
        plan.ensure(plan.planned + 1)
        statistics = plan.statistics()
        assert statistics.tokens > 5e6 * windows
        for part in sources:
            assert statistics.sources[part.name].share == pytest.approx(part.weight, abs=0.001)


def test_without_weights_sources_end_together(tmp_path):
    sources = [source("huge", 9000, epochs=1), source("tiny", 30, shards=1, seed=1, epochs=4)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0)
    packs = plan.total_packs()
    assert packs is not None
    tiny = [number for number in range(packs) if (plan.pack(number).source == 1).any()]
    assert tiny[0] < 0.1 * packs
    assert tiny[-1] > 0.85 * packs
    gaps = np.diff(tiny)
    assert gaps.max() < 0.1 * packs
    assert plan.statistics().ended_by == "all sources"


def test_a_weighted_plan_ends_with_the_source_that_runs_dry_and_keeps_its_mixture(tmp_path):
    sources = [source("scarce", 90, epochs=1, weight=0.5), source("plenty", 900, seed=1, weight=0.5)]
    plan = Plan.open(tmp_path, sources, OPTIONS, seed=0)
    plan.total_packs()
    statistics = plan.statistics()
    assert statistics.ended_by == "scarce"
    assert statistics.sources["scarce"].samples == 90
    assert statistics.sources["scarce"].share == pytest.approx(0.5, abs=512 / statistics.tokens)
    assert plan.ensure(10**6) == plan.planned


def test_what_fits_no_pack_is_dropped_and_counted(tmp_path):
    pages = rows_of(source(rows=900))
    tokens, counts = pages.tokens.copy(), pages.counts.copy()
    tokens[:20], tokens[20:50], counts[50:90, 0] = 0, 600, 9
    plan = Plan.open(tmp_path, [source(columns={"tokens": tokens, "counts": counts})], OPTIONS, seed=0, epochs=2)
    plan.total_packs()
    statistics = plan.statistics().sources["captions"]
    assert statistics.dropped["unusable"] == 40
    assert statistics.dropped["too long"] == 60
    assert statistics.dropped["more image items than the limit"] == 80
    assert statistics.samples == 2 * (900 - 90)
    assert {row for _, _, row in seen(plan)} == set(range(90, 900))


def test_truncation_cuts_text_but_never_media(tmp_path):
    pages = rows_of(source())
    assert pages.media_end is not None
    tokens, media_end = pages.tokens.copy(), pages.media_end.copy()
    tokens[:30] = 700
    media_end[:10], media_end[10:20], media_end[20:30] = 511, 512, 650
    options = PackingOptions(**(vars(OPTIONS) | {"too_long": "truncate"}))
    columns: dict[str, np.ndarray | None] = {"tokens": tokens, "media_end": media_end}
    plan = Plan.open(tmp_path, [source(columns=columns)], options, seed=0, epochs=1)
    cut = []
    for number in range(plan.total_packs() or 0):
        pack = plan.pack(number)
        rows = numbers(plan, pack)
        assert (pack.truncated == (pack.length < tokens[rows, 0])).all()
        cut.extend(rows[pack.truncated].tolist())
        assert (pack.length[pack.truncated] == 512).all()
    assert sorted(cut) == list(range(10))
    statistics = plan.statistics().sources["captions"]
    assert (statistics.truncated, statistics.dropped["too long"]) == (10, 20)
    with pytest.raises(ValueError, match="truncate needs media_end"):
        Plan.open(tmp_path / "blind", [source(columns={"media_end": None})], options, seed=0)


def test_choices_are_drawn_by_their_probabilities_among_those_that_a_row_has(tmp_path):
    rows = 9000
    tokens = np.tile(np.array([[10, 20, 30]], np.int32), (rows, 1))
    tokens[:1000, 0] = 0
    columns: dict[str, np.ndarray | None] = {"tokens": tokens, "media_end": None}
    choices = source(rows=rows, columns=columns, choice_probabilities=np.array([0.6, 0.3, 0.1]))
    plan = Plan.open(tmp_path, [choices], OPTIONS, seed=0, epochs=1)
    drawn = np.full(rows, -1)
    for number in range(plan.total_packs() or 0):
        pack = plan.pack(number)
        drawn[numbers(plan, pack)] = pack.choice
        assert (pack.length == tokens[numbers(plan, pack), pack.choice]).all()
    without, full = (np.bincount(part, minlength=3) / len(part) for part in (drawn[:1000], drawn[1000:]))
    np.testing.assert_allclose(full, [0.6, 0.3, 0.1], atol=0.02)
    np.testing.assert_allclose(without, [0, 0.75, 0.25], atol=0.05)


def test_order_differs_between_epochs_and_stays_local_to_blocks(tmp_path):
    options = PackingOptions(**(vars(OPTIONS) | {"policy": "one-per-pack", "window": 4}))
    plan = Plan.open(tmp_path, [source(epochs=2)], options, seed=0)
    plan.total_packs()
    orders = [[row for _, epoch, row in seen(plan) if epoch == wanted] for wanted in (0, 1)]
    assert orders[0] != orders[1]
    shards_at_a_time = [len({row // 100 for row in orders[0][start : start + 100]}) for start in range(0, 900, 300)]
    assert max(shards_at_a_time) <= 4  # blocks of 3 shards, and what a window carries over
    correlation = np.corrcoef(orders[0][:300], np.arange(300))[0, 1]
    assert abs(correlation) < 0.3


def test_steps_run_over_packs_and_the_last_batch_is_filled_with_empty_packs(tmp_path):
    options = PackingOptions(**(vars(OPTIONS) | {"batch": 7}))
    plan = Plan.open(tmp_path, [source()], options, seed=0, epochs=1)
    with pytest.raises(IndexError, match=r"Plan\.ensure makes more"):
        plan.batch(0)
    packs, steps = plan.total_packs(), plan.total_steps()
    assert packs is not None
    assert packs % 7
    assert steps == packs // 7 + 1
    assert plan.batch(1) == list(range(7, 14))
    assert plan.batch(steps - 1) == [*range(packs - packs % 7, packs), *[-1] * (7 - packs % 7)]
    with pytest.raises(IndexError, match=f"the plan ends after {packs} packs"):
        plan.batch(steps)
    with pytest.raises(IndexError, match=f"the plan ends after {packs} packs"):
        plan.pack(packs)


def test_the_global_batch_may_change_without_changing_packs(tmp_path):
    plan = Plan.open(tmp_path, [source()], OPTIONS, seed=0)
    plan.ensure(40)
    larger = PackingOptions(**(vars(OPTIONS) | {"batch": None, "batch_tokens": 12 * 512}))
    again = Plan.open(tmp_path, [source()], larger, seed=0)
    assert again.fingerprint == plan.fingerprint
    assert again.batch_from(16) == list(range(16, 28))
    assert again.batch(1) == list(range(12, 24))


def test_changed_inputs_are_named(tmp_path):
    Plan.open(tmp_path, [source(), source("pages", 300, shards=3)], OPTIONS, seed=0)
    options = PackingOptions(**(vars(OPTIONS) | {"capacity": 1024}))
    with pytest.raises(PlanChanged, match=r"packing\.capacity: 512 → 1024"):
        Plan.open(tmp_path, [source(), source("pages", 300, shards=3)], options, seed=0)
    with pytest.raises(PlanChanged, match=r"(?s)seed: 0 → 1.*pages\.fingerprint: 'pages-300-0' → 'pages-300-5'"):
        Plan.open(tmp_path, [source(), source("pages", 300, shards=3, seed=5)], OPTIONS, seed=1)
    with pytest.raises(
        PlanChanged, match=r"(?s)sources: \['captions', 'pages'\] → \['captions'\].*pages\.rows: 300 → None"
    ):
        Plan.open(tmp_path, [source()], OPTIONS, seed=0)


def test_a_missing_window_is_noticed(tmp_path):
    Plan.open(tmp_path, [source()], OPTIONS, seed=0).ensure(100)
    sorted(tmp_path.glob("*.npz"))[1].unlink()
    with pytest.raises(PlanDamaged, match=r"window 1 .* is missing"):
        PlanReader(tmp_path, 8)


def test_a_pickled_plan_is_a_small_reader_that_sees_new_windows(tmp_path):
    plan = Plan.open(tmp_path, [source(rows=9000)], OPTIONS, seed=0)
    plan.ensure(10)
    reader = pickle.loads(pickle.dumps(plan))
    assert type(reader) is PlanReader
    assert len(pickle.dumps(plan)) < 1000
    plan.ensure(reader.planned + 1)
    assert seen(reader, plan.planned) == seen(plan)
    assert reader.batch(plan.planned // 8 - 1) == plan.batch(plan.planned // 8 - 1)


def test_sources_without_usable_rows_are_refused_with_the_reasons(tmp_path):
    tokens = np.full((900, 1), 600, np.int32)
    tokens[:100] = 0
    with pytest.raises(ValueError, match="captions: none of its 900 rows can be used: 100 unusable, 800 too long"):
        Plan.open(tmp_path, [source(columns={"tokens": tokens})], OPTIONS, seed=0)


def test_sources_and_options_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without one: pages"):
        Plan.open(tmp_path, [source(weight=1.0), source("pages")], OPTIONS, seed=0)
    with pytest.raises(ValueError, match="repeated: captions"):
        Plan.open(tmp_path, [source(), source()], OPTIONS, seed=0)
    with pytest.raises(ValueError, match="names images; the sources count image, speech, point"):
        Plan.open(tmp_path, [source()], PackingOptions(limits={"images": 3}), seed=0)
    with pytest.raises(ValueError, match="choice probabilities"):
        source(choice_probabilities=np.array([0.4]))
    with pytest.raises(ValueError, match=r"counts is for \(3, 3\)"):
        source(columns={"counts": np.zeros((3, 3), np.int16)})
    with pytest.raises(ValueError, match="one of drop, truncate"):
        PackingOptions(too_long="split")
    with pytest.raises(ValueError, match=r"one of packing\.batch and packing\.batch_tokens"):
        PackingOptions(batch_tokens=1000)


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "packing").glob("*.yaml")))
def test_every_preset_plans(preset, tmp_path):
    options = load(PackingOptions, ROOT / "packing" / preset)
    part = source(capacity=options.capacity)
    assert Plan.open(tmp_path, [part], options, seed=0, epochs=1).total_steps()


def test_a_pack_knows_what_it_costs(tmp_path):
    plan = Plan.open(tmp_path, [source()], OPTIONS, seed=0, flops=lambda lengths: lengths.astype(float) ** 2)
    plan.ensure(40)
    rows = rows_of(source())
    assert rows.media_flops is not None
    assert rows.media_tokens is not None
    for number in range(40):
        pack = plan.pack(number)
        mine = numbers(plan, pack)
        expected = rows.media_flops[mine].sum(), (pack.length.astype(float) ** 2).sum()
        assert plan.costs([number, -1]).tolist() == [list(expected), [0.0, 0.0]]
        assert plan.media_tokens(number).tolist() == rows.media_tokens[mine].sum(axis=0).tolist()


def test_eight_packs_in_a_row_cost_alike(tmp_path):
    options = PackingOptions(**(vars(OPTIONS) | {"window": 256}))
    spreads = {}
    for alike in (1, 8):
        plan = Plan.open(tmp_path / str(alike), [source(rows=9000)], replace(options, alike=alike), seed=0)
        plan.ensure(400)
        costs = plan.costs(range(400)).reshape(50, 8, 2)[:, :, 0]
        spreads[alike] = np.median(np.ptp(costs, axis=1))
    assert spreads[8] < spreads[1] / 4


def test_batches_of_one_kind_are_refused():
    with pytest.raises(ValueError, match=r"packing\.alike is 8 and a global batch has 4 packs"):
        PackingOptions(alike=8, batch=4)


def test_another_model_is_another_plan(tmp_path):
    Plan.open(tmp_path, [source()], OPTIONS, seed=0, about={"tokens of a picture": 16})
    with pytest.raises(PlanChanged, match="tokens of a picture: 16 → 32"):
        Plan.open(tmp_path, [source()], OPTIONS, seed=0, about={"tokens of a picture": 32})


def test_a_stage_with_other_blocks_passes_over_the_rest_of_a_block_that_was_begun(tmp_path):
    first = Plan.open(tmp_path / "first", [source(rows=9000)], OPTIONS, seed=0, epochs=1)
    first.ensure(64)
    start = {name: read.cursor for name, read in first.read_to(first.planned).items()}
    assert start["captions"].row > 0
    second = Plan.open(tmp_path / "second", [source(rows=9000)], replace(OPTIONS, shuffle_shards=2), 0, 1, start)
    second.total_packs()
    assert not set(seen(first)) & set(seen(second))
    assert len(seen(second)) == 9000 - 3000  # of 9 shards, the 3 of the first block


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.keeps_order])
def test_a_policy_that_keeps_order_keeps_that_of_every_source_over_the_whole_plan(policy, tmp_path):
    displacement = POLICIES[policy].displacement
    assert displacement is not None
    sources = [source(), source("pages", 300, shards=3, seed=1)]
    plan = Plan.open(tmp_path, sources, replace(OPTIONS, policy=policy), seed=0, epochs=1)
    packs = plan.total_packs() or 0
    for number, rows in ((0, 900), (1, 300)):
        found = [
            (pack, row)
            for pack in range(packs)
            for row in numbers(plan, plan.pack(pack))[plan.pack(pack).source == number].tolist()
        ]
        assert sorted(row for _, row in found) == list(range(rows))
        in_order = dict(map(reversed, found))
        behind = np.maximum.accumulate([in_order[row] for row in range(rows)]) - [in_order[row] for row in range(rows)]
        assert behind.max() <= displacement
        thirds = np.array_split(np.array([row for _, row in found]), 3)  # sources go on side by side, not in turns
        assert all(abs(third.mean() / rows - (2 * k + 1) / 6) < 0.05 for k, third in enumerate(thirds))
    half = seen(plan, packs // 2)
    assert abs(sum(number == 1 for number, *_ in half) / len(half) - 0.25) < 0.05


def test_statistics_add_up(tmp_path):
    parts = [source(), source("pages", 300, shards=3, seed=1)]
    plan = Plan.open(tmp_path, parts, OPTIONS, seed=0, epochs=1)
    packs = plan.total_packs()
    statistics = plan.statistics()
    lengths = np.concatenate([plan.pack(number).length for number in range(packs or 0)])
    assert statistics.tokens == lengths.sum() == sum(rows_of(part).tokens.sum() for part in parts)
    assert statistics.samples == len(lengths) == 1200
    assert statistics.fill == pytest.approx(lengths.sum() / (packs * 512))
    images = sum(int(rows_of(part).counts[:, 0].sum()) for part in parts)
    assert statistics.lower_bound == pytest.approx(max(lengths.sum() / 512, images / 8))
    media = rows_of(parts[1]).media_tokens
    assert media is not None
    assert sum(part.items["image"] for part in statistics.sources.values()) == images
    assert statistics.sources["pages"].media_tokens["image"] == media.sum()


def test_a_sample_that_fits_badly_waits_for_one_window_at_most(tmp_path):
    # Nothing complements 300 of 512 tokens: those packs are always the least full.
    tokens = np.full((900, 1), 256, np.int32)
    tokens[::50] = 300
    awkward = source(columns={"tokens": tokens, "counts": np.zeros((900, 3), np.int16)})
    plan = Plan.open(tmp_path, [awkward], OPTIONS, seed=0, epochs=1)
    plan.total_packs()
    for path in sorted(tmp_path.glob("*.npz"))[1:]:
        with np.load(path) as window:
            waited = set(window["rows"][window["rows"]["carried"]][["shard", "row"]].tolist())
            assert not waited & set(window["carried"][["shard", "row"]].tolist())
    assert len(seen(plan)) == 900


def test_a_next_stage_goes_on_with_unseen_rows(tmp_path):
    first = Plan.open(tmp_path / "first", [source(rows=9000)], OPTIONS, seed=0, epochs=1)
    first.ensure(64)
    start = {name: read.cursor for name, read in first.read_to(first.planned).items()}
    options = PackingOptions(**(vars(OPTIONS) | {"capacity": 1024}))
    second = Plan.open(tmp_path / "second", [source(rows=9000)], options, seed=0, epochs=1, start=start)
    second.total_packs()
    assert not set(seen(first)) & set(seen(second))
    assert len(seen(second)) == 9000 - 1000 * start["captions"].shard - start["captions"].row
    with pytest.raises(ValueError, match="start names other"):
        Plan.open(tmp_path / "third", [source()], OPTIONS, seed=0, start={"other": Cursor()})


def test_an_endless_plan_has_no_total(tmp_path):
    plan = Plan.open(tmp_path, [source(), source("pages", 300, shards=3, epochs=1)], OPTIONS, seed=0)
    assert plan.total_packs() is None
    assert plan.total_steps() is None
    plan.ensure(1200)
    assert plan.statistics().sources["captions"].epochs > 1
    assert plan.statistics().sources["pages"].samples == 300
