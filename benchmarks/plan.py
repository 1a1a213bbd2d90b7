"""What the plan gives: fill of packs, distance from the lower bound, balance over ranks, time and memory.

    python -m benchmarks.plan                 all tables
    python -m benchmarks.plan --samples 40000 --seeds 3 --only fill limits

Every number but time and memory is exact for its seed; the spread over seeds is given as ±.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.lengths import IMAGE_TOKENS, Lengths, mixed_lengths
from mm.configure import load
from mm.packing.balance import deal, imbalance, imbalance_bound, side_by_side
from mm.packing.fit import POLICIES, best_fit, first_fit_decreasing, in_order, lower_bound, next_8_fit
from mm.packing.hashing import shuffled
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.source import Rows, Source

PRESETS = Path(__file__).parent.parent / "packing"
CAPACITY = 4096
PLANNED = 1_000_000
WINDOW = 2048  # packs
ALIKE = (8, 16)

# Forward FLOPs of a SigLIP SO400M with 729 patches for the 144 tokens of an image, and of a Qwen2.5-1.5B.
ENCODER_OF_IMAGE = 2 * 4.0e8 * 729 + 27 * 4 * 729**2 * 1152
DECODER_OF_TOKEN = 2 * 1.54e9
DECODER_OF_PAIR = 28 * 4 * 1536 / 2  # of two tokens that attend to each other, causal


def buffered(lengths: np.ndarray, size: int) -> int:
    """Packs if a buffer of `size` samples is packed at a time and whatever is not full leaves as it is."""
    return sum(
        first_fit_decreasing(lengths[start : start + size], CAPACITY).number for start in range(0, len(lengths), size)
    )


def first_fit(mixture: Lengths, limit: int) -> int:
    """Packs of first-fit as samples come with all packs open and a limit on images."""
    rooms = np.empty((len(mixture.tokens), 2), np.int64)
    packs = 0
    for sizes in np.column_stack([mixture.tokens, mixture.images]):
        fits = (rooms[:packs] >= sizes).all(axis=1)
        place = int(fits.argmax()) if fits.any() else packs
        if place == packs:
            rooms[packs] = CAPACITY, limit
            packs += 1
        rooms[place] -= sizes
    return packs


def dot_product(mixture: Lengths, limit: int) -> int:
    """Packs filled one at a time with the sample that has the largest Σ demand · size · room over tokens and images.

    As Panigrahy et al. 2011, "Heuristics for Vector Bin Packing": demand is the mean of what is left to pack.
    """
    cells, left = np.unique(np.column_stack([mixture.tokens, mixture.images]), axis=0, return_counts=True)
    sizes = cells / [CAPACITY, limit]
    packs = 0
    while left.any():
        packs += 1
        room = np.array([CAPACITY, limit])
        while (fits := (cells <= room).all(axis=1) & (left > 0)).any():
            taken = np.where(fits, sizes @ (left @ sizes * room / [CAPACITY, limit]), -1.0).argmax()
            left[taken] -= 1
            room -= cells[taken]
    return packs


def fill_table(samples: int, seeds: int) -> None:
    ways: dict[str, Callable[[np.ndarray], int]] = {
        "one sample a pack (pad each)": len,
        "next-fit": lambda lengths: in_order(lengths, CAPACITY).number,
        "buffer of 8 samples (as nanoVLM's)": lambda lengths: buffered(lengths, 8),
        "buffer of 64 samples": lambda lengths: buffered(lengths, 64),
        "buffer of 256 samples": lambda lengths: buffered(lengths, 256),
        "next-8-fit": lambda lengths: next_8_fit(lengths, CAPACITY).number,
        "best-fit, windows of 2048 packs (a plan)": lambda lengths: planned(lengths)[0],
        "best-fit, all at once": lambda lengths: best_fit(lengths, CAPACITY).number,
    }
    print(f"\nFill, {samples} samples, capacity {CAPACITY}, no limit on images")
    mixtures = [mixed_lengths(samples, seed=seed).tokens for seed in range(seeds)]
    for name, way in ways.items():
        fills = [100 * lengths.sum() / (CAPACITY * way(lengths)) for lengths in mixtures]
        print(f"  {name:42} {spread(fills)} %")


def limits_table(samples: int, seeds: int) -> None:
    print(f"\nLower bound / packs with a limit on images, {samples} samples; the second column says what binds")
    policies = [name for name in POLICIES if name != "one-per-pack"]
    ways = [*policies, "first-fit", "dot product"]
    print(f"  {'limit':>5}  {'ΣL/C : Σn/limit':>15}" + "".join(f"  {name:>20}" for name in ways))
    for limit in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 32):
        results: dict[str, list[float]] = {name: [] for name in ways}
        ratio = ""
        for seed in range(seeds):
            mixture = mixed_lengths(samples, seed=seed)
            mixture = mixture.where(mixture.images <= limit)
            arguments = (mixture.tokens, CAPACITY, mixture.images[:, None], np.array([limit]))
            packs = {name: POLICIES[name](*arguments).number for name in policies}
            packs |= {"first-fit": first_fit(mixture, limit), "dot product": dot_product(mixture, limit)}
            for name in ways:
                results[name].append(100 * lower_bound(*arguments) / packs[name])
            ratio = f"{mixture.tokens.sum() / CAPACITY:.0f} : {mixture.images.sum() / limit:.0f}"
        print(f"  {limit:>5}  {ratio:>15}" + "".join(f"  {spread(results[name]):>18} %" for name in ways), flush=True)


def presets_table(samples: int, seeds: int) -> None:
    print(f"\nFill of plans with the presets, {samples} samples")
    for path in sorted(PRESETS.glob("*.yaml")):
        options = load(PackingOptions, path)
        fills = []
        for seed in range(seeds):
            mixture = mixed_lengths(samples, capacity=options.capacity, seed=seed)
            mixture = mixture.where(mixture.images <= options.limits.get("image", samples))
            packs, _ = planned(mixture.tokens, mixture.images, options)
            fills.append(100 * mixture.tokens.sum() / (options.capacity * packs))
        print(f"  {path.stem:16} {options.policy:22} {spread(fills)} %")


def balance_table(seeds: int) -> None:
    print(
        "\nTime of a global batch over perfectly even ranks, Σ (max encoder + max decoder) / Σ means; how much batches"
        "\ndiffer in cost (deviation over mean). Windows of 2048 packs"
    )
    for training, factor in (("encoder trained", 3.0), ("encoder frozen", 1.0)):
        windows = [pack_costs(WINDOW, seed, factor) for seed in range(seeds)]
        alike = [
            {size: costs[side_by_side(costs, size, 0, seed)] for size in ALIKE} for seed, costs in enumerate(windows)
        ]
        for world, micro_steps in ((8, 8), (8, 32), (16, 4), (64, 8)):
            ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
                "as they come": lambda part, world=world: np.arange(len(part)).reshape(-1, world),
                "equal sums per rank": lambda part, world=world: levelled(part.sum(axis=1), world),
                "sorted by total": lambda part, world=world: np.argsort(part.sum(axis=1)).reshape(-1, world),
                "dealt": lambda part, world=world: deal(part, world, 0),
            }
            print(f"  {training}, {world} ranks × {micro_steps} packs")
            for name, way in ways.items():
                print(f"    {name:34} {balance_of(windows, world, micro_steps, way)}")
            bound = [imbalance_bound(part, world) for costs in windows for part in batches(costs, world * micro_steps)]
            print(f"    {'(no deal of these is below)':34} {statistics.mean(bound):6.3f}")
            for size in ALIKE:
                orders = [orders[size] for orders in alike]
                name = f"ours: {size} alike in a row, dealt"
                print(f"    {name:34} {balance_of(orders, world, micro_steps, ways['dealt'])}", flush=True)


def balance_of(
    windows: Sequence[np.ndarray], world: int, micro_steps: int, way: Callable[[np.ndarray], np.ndarray]
) -> str:
    """Mean imbalance of each window's batches ± half the range over windows, and the deviation of batches' costs."""
    parts = [list(batches(costs, world * micro_steps)) for costs in windows]
    lost = [statistics.mean(imbalance(part, way(part)) for part in window) for window in parts]
    totals = [[float(part.sum()) for part in window] for window in parts]
    differ = statistics.mean(statistics.pstdev(window) / statistics.mean(window) for window in totals)
    return f"{spread(lost, digits=3)}; {100 * differ:.1f} %"


def batches(costs: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Global batches of `size` packs, as many as are whole."""
    return (costs[start : start + size] for start in range(0, len(costs) - size + 1, size))


def pack_costs(number: int, seed: int, encoder_factor: float) -> np.ndarray:
    """(number, 2) encoder and decoder FLOPs of packs of the mixture, forward and backward, in random order."""
    mixture = mixed_lengths(number * 8, seed=seed)
    packs = best_fit(mixture.tokens, CAPACITY, mixture.images[:, None], np.array([16]))
    encoder = packs.sums(mixture.image_tokens) / IMAGE_TOKENS * ENCODER_OF_IMAGE
    decoder = CAPACITY * DECODER_OF_TOKEN + packs.sums(mixture.tokens**2) * DECODER_OF_PAIR
    costs = np.column_stack([encoder_factor * encoder, 3 * decoder])
    return costs[shuffled(packs.number, seed)][:number]


def levelled(totals: np.ndarray, world: int) -> np.ndarray:
    """Packs dealt so that ranks get equal sums, the most expensive first; each rank takes its own as they come."""
    places = len(totals) // world
    ranks: list[list[int]] = [[] for _ in range(world)]
    sums = np.zeros(world)
    for pack in np.argsort(-totals):
        free = [rank for rank in range(world) if len(ranks[rank]) < places]
        rank = min(free, key=lambda rank: sums[rank])
        ranks[rank].append(int(pack))
        sums[rank] += totals[pack]
    return np.array([sorted(packs) for packs in ranks]).T


def planned(
    lengths: np.ndarray, images: np.ndarray | None = None, options: PackingOptions | None = None
) -> tuple[int, float]:
    """Packs of a whole plan on disk, and lower bound / packs."""
    shards = 100
    options = options or PackingOptions(capacity=CAPACITY, policy="best-fit")
    counts = np.zeros((len(lengths), 3), np.int16)
    counts[:, 0] = 0 if images is None else images
    rows = Rows(
        shards=np.diff(np.linspace(0, len(lengths), shards + 1).astype(np.int64)),
        tokens=lengths[:, None].astype(np.int32),
        counts=counts,
        media_end=np.zeros((len(lengths), 1), np.int32),
    )
    source = Source.of_rows("mixture", rows, np.ones(1), "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.open(folder, [source], options, seed=0, epochs=1)
        packs = plan.total_packs() or 0
        return packs, plan.statistics().lower_bound / packs


def million(policy: str, limit: int | None) -> None:
    """Prints time and peak memory of planning a million samples in this process."""
    mixture = mixed_lengths(PLANNED)
    mixture = mixture.where(mixture.images <= (limit or PLANNED))
    limits = {} if limit is None else {"image": limit}
    start, cpu = time.perf_counter(), time.process_time()
    counts = None if limit is None else mixture.images[:, None]
    POLICIES[policy](mixture.tokens, CAPACITY, counts, None if limit is None else np.array([limit]))
    at_once, at_once_cpu = time.perf_counter() - start, time.process_time() - cpu
    start, cpu = time.perf_counter(), time.process_time()
    options = PackingOptions(capacity=CAPACITY, limits=limits, policy=policy)
    packs, efficiency = planned(mixture.tokens, mixture.images, options)
    in_windows, in_windows_cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"  {policy:20} limit {limit!s:>4}: packed at once {at_once:.1f} s ({at_once_cpu:.1f} s CPU), planned to disk "
        f"{in_windows:.1f} s ({in_windows_cpu:.1f} s CPU), bound / packs {100 * efficiency:.2f} %, {packs} packs, "
        f"peak {peak:.0f} MiB"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± half the range."""
    return f"{statistics.mean(values):6.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000, help="a multiple of 100")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("fill", "limits", "presets", "balance", "million"))
    # A policy, and a limit on images, 0 for none; a process of its own.
    parser.add_argument("--million", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.million is not None:
        million(options.million[0], int(options.million[1]) or None)
        return
    wanted = options.only or ("fill", "limits", "presets", "balance", "million")
    if "fill" in wanted:
        fill_table(options.samples, options.seeds)
    if "limits" in wanted:
        limits_table(options.samples, options.seeds)
    if "presets" in wanted:
        presets_table(options.samples, options.seeds)
    if "balance" in wanted:
        balance_table(options.seeds)
    if "million" in wanted:
        print(f"\nTime and memory for {PLANNED} samples, one process each")
        for policy, limit in (*(("best-fit", limit) for limit in (0, 8, 10, 16, 32)), ("next-8-fit", 16)):
            subprocess.run([sys.executable, "-m", "benchmarks.plan", "--million", policy, str(limit)], check=True)


if __name__ == "__main__":
    main()
