"""What logging costs a step: all meters and writers as a run has them, and none.

Both arms do the same steps on the same batches. They take turns, so that a busy machine slows both; a turn gives a
ratio, of which median, smallest and largest are printed. The cost of a step's calls is also timed alone, which is the
sharper figure: it does not hang on how steady two turns of seconds are.

    python -m benchmarks.meters --threads 2
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lengths import mixed_lengths
from benchmarks.train import QUICK, Arm, Load, Sizes, build_ours, make_documents, packed_arm
from mm.packing.batch import Batch
from mm.train.clock import PHASES, Phase
from mm.train.memory import Memory, held_bytes
from mm.train.meter import JsonLines, Meter, Peak, Progress, TensorBoard, Writer, training_factors

ALONE = 200
"""Steps of the calls without training."""


class Logged:
    """The calls of a step of `mm.train.loop`, with every writer that takes none of the network."""

    def __init__(self, arm: Arm, folder: Path, every: int) -> None:
        peak = Peak(1e12, "made up: measuring it is not part of a step", "mfu")
        cpu = torch.device("cpu")
        memory = Memory(cpu, held_bytes(arm.model, arm.optimizer, cpu))
        names = ["total", *(f"source/{number}" for number in range(8))]
        self.meter = Meter(names, training_factors(arm.model.trained_parts()), peak, memory=memory)
        self.terminal = Progress(1_000_000, console=Console(file=io.StringIO()))
        self.writers: list[Writer] = [
            self.terminal,
            JsonLines(folder / "metrics.jsonl", 1),
            TensorBoard(folder / "tensorboard", 1),
        ]
        self._losses = {name: (torch.ones(()), torch.ones(())) for name in names}
        self._model: Any = arm.model
        self._every, self._steps = every, 0

    def timed(self, phase: Phase) -> AbstractContextManager[None]:
        return self.meter.timed(phase)

    def end_step(self, batch: Batch) -> None:
        self.meter.add_losses(self._losses)
        self.meter.add_batch(batch.real_tokens, len(batch.tokens), self._model.flops(batch))
        self.meter.end_step(1.0, 1e-4)
        with self.meter.paused():
            pass
        self._steps += 1
        self.terminal.advance()
        if self._steps % self._every == 0:
            figures = self.meter.report()
            for writer in self.writers:
                writer.write(self._steps, figures)


def step(arm: Arm, load: Load, timed: Callable[[Phase], AbstractContextManager[None]]) -> None:
    with timed("data"):
        pass
    with timed("sync"):
        pass
    with timed("forward"):
        loss = arm.loss(arm.model, load.inputs)
    with timed("backward"):
        loss.backward()
    with timed("optimizer"):
        arm.optimizer.step()
        arm.optimizer.zero_grad()


def without(phase: Phase) -> AbstractContextManager[None]:
    return nullcontext()


def compare(folder: Path, sizes: Sizes, every: int, turns: int) -> None:
    """Prints seconds a step with and without, their ratio, and what the calls alone take."""
    arm = packed_arm(make_documents(mixed_lengths(60), sizes), sizes.decoder["context"], build_ours(sizes, folder))
    logged = Logged(arm, folder, every)

    loads = [arm.loads[number % len(arm.loads)] for number in range(every)]

    def turn(logs: bool) -> float:
        start = time.perf_counter()
        for load in loads:
            step(arm, load, logged.timed if logs else without)
            if logs:
                logged.end_step(load.inputs)
        return (time.perf_counter() - start) / every

    def calls() -> float:
        start = time.perf_counter()
        for load in loads:
            for phase in PHASES:
                with logged.timed(phase):
                    pass
            logged.end_step(load.inputs)
        return (time.perf_counter() - start) / every

    turn(False), turn(True)
    measured = []
    for number in range(turns):
        first = bool(number % 2)
        one, other = turn(first), turn(not first)
        measured.append((one, other) if first else (other, one))
    ratios = [on / off - 1 for on, off in measured]
    off = statistics.median(off for _, off in measured)
    alone = [calls() for _ in range(ALONE // every)]
    print(f"{sizes}, {torch.get_num_threads()} threads, a report every {every} steps, {turns} turns")
    print(f"  a step without logging      {1e3 * off:.1f} ms")
    print(f"  with it, by turns           {_percents(ratios)}")
    print(
        f"  the calls of a step alone   {1e3 * statistics.median(alone):.3f} ms, {_percents([x / off for x in alone])}"
    )


def _percents(shares: list[float]) -> str:
    low, middle, high = min(shares), statistics.median(shares), max(shares)
    return f"{100 * middle:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10, help="steps from one report to the next")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, its ratios say little")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), QUICK.sizes if options.quick else Sizes(), options.every, options.turns)


if __name__ == "__main__":
    main()
