"""What saving costs a step: a save every n steps in the background, one that is waited for, and none.

The three take turns, so that a busy machine slows all of them. A turn is n steps on the same batches, with a save at
its beginning, and ends when that is on disk. It gives a ratio to the turn without, of which median, smallest and
largest are printed.

    python -m benchmarks.checkpoint --every 20 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.lengths import mixed_lengths
from benchmarks.train import QUICK, Sizes, build_ours, make_documents, packed_arm
from mm.train.checkpoint import Position
from mm.train.optim import OptimOptions
from mm.train.parallel import Engine, World, join_world
from mm.train.saving import Saver

ARMS = ("none", "background", "waited for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, its ratios say little")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, join_world() as world:
        compare(Path(folder), world, QUICK.sizes if options.quick else Sizes(), options.every, options.turns)


def compare(folder: Path, world: World, sizes: Sizes, every: int, turns: int) -> None:
    """Prints seconds a step of each arm, and its ratio to the one that saves nothing."""
    arm = packed_arm(make_documents(mixed_lengths(60), sizes), sizes.decoder["context"], build_ours(sizes, folder))
    engine = Engine(arm.model, arm.optimizer, world, OptimOptions())
    savers = {
        name: Saver(folder / name, world, keep=1, keep_every=0, background=name == "background") for name in ARMS[1:]
    }

    def turn(name: str, step: int) -> tuple[float, float]:
        """Seconds of a turn, and those of them for which the first step had to wait."""
        start = time.perf_counter()
        if saver := savers.get(name):
            saver.save(engine, Position(step, 0, 0, ""))
        held_up = time.perf_counter() - start
        for number in range(every):
            arm.step(arm.loads[number % len(arm.loads)])
        if saver:
            saver.wait()
        return time.perf_counter() - start, held_up

    arm.run(arm.loads)
    for name in ARMS:
        turn(name, 0)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for number in range(turns):
        for shift in range(len(ARMS)):
            name = ARMS[(number + shift) % len(ARMS)]
            measured[name].append(turn(name, number + 1))
    for saver in savers.values():
        saver.close()
    path = savers["background"].last
    assert path is not None
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{sizes}, {torch.get_num_threads()} threads, {size / 1e6:.0f} MB a save, one every {every} steps")
    for name in ARMS:
        ratios = [own / none for (own, _), (none, _) in zip(measured[name], measured["none"], strict=True)]
        seconds, held_up = (statistics.median(values) for values in zip(*measured[name], strict=True))
        print(
            f"  {name:12} {seconds / every:.3f} s a step, held up {held_up:.3f} s a save   "
            f"{100 * (statistics.median(ratios) - 1):+.1f} % ({100 * (min(ratios) - 1):+.1f} to "
            f"{100 * (max(ratios) - 1):+.1f})"
        )


if __name__ == "__main__":
    main()
