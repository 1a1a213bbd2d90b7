"""Packs of like cost are worked on side by side; hashes are the reference's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.packing.balance import deal, imbalance, imbalance_bound, side_by_side
from mm.packing.hashing import GOLDEN, hash64, mix, shuffled


def costs_of_packs(packs: int, seed: int) -> np.ndarray:
    """Encoder and decoder costs that do not go together, as of packs with few and with many images."""
    random = np.random.default_rng(seed)
    return np.column_stack([random.gamma(4, 1, packs), 4 + random.random(packs)])


@given(world=st.integers(1, 8), micro_steps=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_pack_is_dealt_once_and_every_rank_gets_as_many(world, micro_steps, seed):
    costs = costs_of_packs(world * micro_steps, seed)
    dealt = deal(costs, world, seed)
    assert dealt.shape == (micro_steps, world)
    assert sorted(dealt.ravel().tolist()) == list(range(world * micro_steps))


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_deal_beats_random_sorted_and_levelled_packs(seed):
    costs = costs_of_packs(64, seed)
    dealt = imbalance(costs, deal(costs, 8, seed))
    by_total = np.argsort(costs.sum(axis=1))
    levelled = np.concatenate([row[:: 1 if i % 2 else -1] for i, row in enumerate(by_total.reshape(8, 8))])
    assert dealt <= imbalance(costs, by_total.reshape(8, 8))
    assert dealt < imbalance(costs, levelled.reshape(8, 8).T)
    assert dealt < imbalance(costs, shuffled(64, seed).reshape(8, 8))
    assert imbalance_bound(costs, 8) <= dealt


@given(packs=st.integers(0, 200), size=st.integers(1, 12), first=st.integers(0, 50), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_an_order_of_alike_packs_holds_every_pack_once(packs, size, first, seed):
    assert sorted(side_by_side(costs_of_packs(packs, seed), size, first, seed).tolist()) == list(range(packs))


@pytest.mark.parametrize("first", [0, 5, 8])
def test_packs_between_multiples_of_the_size_are_alike_in_both_costs(first):
    costs = costs_of_packs(2048, 0)
    ordered = costs[side_by_side(costs, 8, first, 0)]
    groups = ordered[-first % 8 :][: 8 * 255].reshape(-1, 8, 2)
    assert np.median(np.ptp(groups, axis=1) / costs.std(axis=0), axis=0).max() < 0.25
    straddling = ordered[(-first + 4) % 8 :][: 8 * 255].reshape(-1, 8, 2)
    assert np.median(np.ptp(straddling, axis=1) / costs.std(axis=0), axis=0).max() > 0.25


def test_alike_packs_are_dealt_to_as_many_ranks_with_less_than_half_the_loss():
    costs = costs_of_packs(2048, 0)
    lost = {
        size: np.mean([imbalance(batch, deal(batch, 8, 0)) - 1 for batch in costs[order].reshape(-1, 64, 2)])
        for size in (1, 8)
        for order in [side_by_side(costs, size, 0, 0)]
    }
    assert lost[8] < lost[1] / 2


def test_batches_of_alike_packs_differ_less_in_cost_than_if_groups_came_at_random():
    ours, at_random = [], []
    for seed in range(8):
        costs = costs_of_packs(2048, seed)
        groups = costs[side_by_side(costs, 8, 0, seed)].sum(axis=1).reshape(-1, 8).sum(axis=1)
        ours.append(groups.reshape(-1, 8).sum(axis=1).std())
        at_random.append(groups[shuffled(256, seed)].reshape(-1, 8).sum(axis=1).std())
    assert np.mean(ours) < 0.65 * np.mean(at_random)


def test_alike_packs_come_in_no_order_of_cost():
    costs = costs_of_packs(2048, 0)
    totals = costs[side_by_side(costs, 8, 0, 0)].sum(axis=1).reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(np.arange(256), totals)[0, 1]) < 0.1
    assert side_by_side(costs, 8, 0, 0).tolist() != side_by_side(costs, 8, 0, 1).tolist()


def test_a_small_deal_is_the_best_of_all():
    # 6 packs, 3 ranks: all 10 ways to make two groups of three.
    for seed in range(20):
        costs = costs_of_packs(6, seed)
        ways = [np.array([[0, a, b], sorted({1, 2, 3, 4, 5} - {a, b})]) for a in range(1, 6) for b in range(a + 1, 6)]
        assert imbalance(costs, deal(costs, 3, 0)) == pytest.approx(
            min(imbalance(costs, way) for way in ways), rel=0.01
        )


def test_imbalance_is_the_time_of_the_slowest_over_the_mean():
    costs = np.array([[1.0, 10.0], [3.0, 10.0], [2.0, 20.0], [2.0, 10.0]])
    # micro-step 1: 3 + 10; micro-step 2: 2 + 20; means 2 + 10 and 2 + 15
    assert imbalance(costs, np.array([[0, 1], [2, 3]])) == pytest.approx(35 / 29)
    assert imbalance(np.ones((4, 2)), np.array([[0, 1], [2, 3]])) == 1.0
    assert imbalance(np.zeros((4, 2)), np.array([[0, 1], [2, 3]])) == 1.0


def test_micro_steps_do_not_run_from_cheap_to_expensive():
    costs = costs_of_packs(256, 0)
    totals = costs.sum(axis=1)[deal(costs, 4, seed=0)].mean(axis=1)
    assert abs(np.corrcoef(np.arange(64), totals)[0, 1]) < 0.4
    assert deal(costs, 4, seed=0).tolist() != deal(costs, 4, seed=1).tolist()


def test_empty_packs_are_worked_on_together():
    costs = costs_of_packs(16, 0)
    costs[[1, 5, 8, 13]] = 0.0
    assert [1, 5, 8, 13] in deal(costs, 4, seed=0).tolist()


def test_packs_that_do_not_divide_are_refused_with_what_would():
    with pytest.raises(ValueError, match=r"64 packs .* 6 ranks; 4 or 8 ranks would do, or a batch of 60 or 66 packs"):
        deal(np.ones((64, 2)), 6, 0)
    with pytest.raises(ValueError, match=r"4 packs .* 8 ranks; 4 ranks would do, or a batch of 8 packs"):
        deal(np.ones((4, 2)), 8, 0)


def test_hash_is_splitmix64():
    # The generator's first outputs for seed 1234567, as published with its reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = np.uint64(1234567) + GOLDEN * np.arange(1, 5, dtype=np.uint64)
    assert mix(states).tolist() == published
    assert int(hash64(1234567)) == published[0]


def test_hash_depends_on_every_key_and_their_order():
    hashes = [
        hash64(0, "a", 1),
        hash64(0, "a", 2),
        hash64(0, "b", 1),
        hash64(1, "a", 0),
        hash64("a", 0, 1),
        hash64(0, "a"),
    ]
    assert len({int(value) for value in hashes}) == len(hashes)
    np.testing.assert_array_equal(hash64(3, np.arange(5)), [hash64(3, number) for number in range(5)])


def test_shuffles_are_permutations_without_pattern():
    order = shuffled(10_000, 7, "rows")
    assert sorted(order.tolist()) == list(range(10_000))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, shuffled(10_000, 8, "rows"))[0, 1]) < 0.05
