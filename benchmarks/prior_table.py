"""What the runs of `benchmarks.prior` show, as tables in Markdown and, with a path, as a plot.

The losses of single words, from which it is computed, lie in FOLDER/measured and not in prior.jsonl.

    python -m benchmarks.prior_table FOLDER … [--plot PLOT.png]      one folder for each setting
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.prior import (
    ARMS,
    BLIND,
    DROP,
    FOLDS,
    PLAIN,
    RATES,
    SEEDS,
    Job,
    best_rate,
    is_of,
    judges,
    plain_of,
    results_of,
    setting_of,
)
from mm.evaluate.intervals import clustered_interval


@dataclass(frozen=True)
class HeldOut:
    """What a run says of the held-out words, caption after caption.

    nll: (n,) nats
    caption: (n,) number of the caption of each
    right: (n,) 1 where the word was the most probable one, else 0; NaN where it was not measured
    divided: (n,) nats with the run's weights divided out, likewise
    """

    nll: np.ndarray
    caption: np.ndarray
    right: np.ndarray
    divided: np.ndarray

    @classmethod
    def read(cls, folder: Path, job: Job) -> HeldOut:
        with np.load(folder / "measured" / f"{job.name}.npz") as file:
            nll, sizes = file["nll"], file["sizes"]
            unknown = np.full(len(nll), np.nan)
            right, divided = (np.asarray(file.get(name, unknown), np.float64) for name in ("right", "divided"))
            return cls(nll, np.repeat(np.arange(len(sizes)), sizes), right, divided)


@dataclass(frozen=True)
class Change:
    """Nats that an arm adds to plain training's loss: of each seed, and the 95 % interval of their mean."""

    seeds: list[float]
    low: float
    high: float

    def __str__(self) -> str:
        spread = f"; {min(self.seeds):+.3f} to {max(self.seeds):+.3f}" if len(self.seeds) > 1 else ""
        return f"{statistics.mean(self.seeds):+.3f} ({self.low:+.3f} to {self.high:+.3f}{spread})"


HEADER = (
    "arm",
    "seeds",
    "image-related, nats",
    "− plain (95 %; seeds)",
    "other, nats",
    "− plain (95 %; seeds)",
    "image-related, weights divided out",
    "image-related, most probable",
    "suite",
)


class Comparison:
    """What came out in one setting, against plain training of the same seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.setting = folder, setting_of(folder)
        self.results = [one for one in results_of(folder) if one["arm"] != "reference"]
        self.done = {Job.of(one): one for one in self.results}
        best = {arm: best_rate(self.results, arm) for arm in RATES}
        pairs = judges(self.setting, best)
        if (rate := best[PLAIN]) is None or None in best.values() or not set(pairs) <= self.done.keys():
            raise SystemExit("the runs that choose the learning rates, or the judges, are missing; go on with `sweep`")
        self.rate, self.blind_rate = rate, best[BLIND]
        self.plain = self.of(PLAIN)
        seeing, self.blind = (
            [HeldOut.read(folder, job).nll for job in pairs if job.arm == arm] for arm in (PLAIN, BLIND)
        )
        self.saved = [without - having for without, having in zip(self.blind, seeing, strict=True)]
        self.related = np.mean(self.saved, axis=0) >= DROP

    def job(self, arm: str, seed: int) -> Job:
        return Job(self.setting, arm, self.rate, seed)

    def of(self, arm: str) -> dict[int, HeldOut]:
        """By seed, where a run and the plain one of its seed are done."""
        jobs = {seed: self.job(arm, seed) for seed in SEEDS if self.job(plain_of(arm), seed) in self.done}
        return {seed: HeldOut.read(self.folder, job) for seed, job in jobs.items() if job in self.done}

    def saving(self) -> tuple[float, float]:
        """Nats that pictures save plain models on the words that *one* judge calls image-related, and on the others.

        Against the other judge without pictures, so that nothing is counted with the luck that it was chosen by.
        """
        plain = np.mean([one.nll for one in self.plain.values()], axis=0)
        found = [
            [float((other - plain)[mask].mean()) for mask in (saved >= DROP, saved < DROP)]
            for saved, other in zip(self.saved, reversed(self.blind), strict=True)
        ]
        there, elsewhere = np.mean(found, axis=0)
        return float(there), float(elsewhere)

    def change(self, arm: str, mask: np.ndarray) -> Change | None:
        """Against plain training of the same seeds, on the masked words; None before a run is done."""
        losses, plain = self.of(arm), self.of(plain_of(arm))
        if not losses:
            return None
        differences = [(one.nll - plain[seed].nll)[mask] for seed, one in losses.items()]
        caption = next(iter(losses.values())).caption[mask]
        return Change(
            [float(one.mean()) for one in differences],
            *clustered_interval(np.mean(differences, axis=0), caption, seed=0),
        )

    def row(self, arm: str) -> list[str] | None:
        """Cells as in `HEADER`; None before a run is done."""
        losses = self.of(arm)
        if not losses:
            return None
        cells = [arm, str(len(losses))]
        for mask in (self.related, ~self.related):
            loss = statistics.mean(float(one.nll[mask].mean()) for one in losses.values())
            cells += [f"{loss:.3f}", "" if arm == plain_of(arm) else str(self.change(arm, mask))]
        seeds = list(losses)
        for column, form in (("divided", ".3f"), ("right", ".1%")):
            values = [getattr(losses[seed], column)[self.related].mean() for seed in seeds]
            known = [value for value in values if not np.isnan(value)]
            cells.append(format(statistics.mean(known), form) if known else "")
        found = [self.done[self.job(arm, seed)] for seed in seeds]
        right = [one["accuracy_likelihood"] for one in found if "accuracy_likelihood" in one]
        return [*cells, f"{statistics.mean(right):.1%}" if right else ""]


def table(folder: Path) -> None:
    """Prints what came out as Markdown."""
    found = Comparison(folder)
    related, (there, elsewhere) = found.related, found.saving()
    print(
        f"{found.setting}, learning rate {found.rate:g}, of judges without pictures {found.blind_rate:g}: "
        f"{related.sum():,} of {len(related):,} held-out words are image-related. Pictures save {there:.3f} nats on "
        f"such words and {elsewhere:.3f} on others, by other seeds\n"
    )
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for arm in ARMS:
        if arm != BLIND and (cells := found.row(arm)):
            print(f"| {' | '.join(cells)} |")
    on_cpu = [one["cpu_seconds"] for one in found.results if one["arm"] == "PRIOR 1" and one["device"] == "CPU"]
    for one in results_of(folder):
        if one["arm"] == "reference" and on_cpu:
            share = one["cpu_seconds"] / statistics.mean(on_cpu)
            print(f"\nReference in {FOLDS} folds: {one['cpu_seconds']} CPU s, {share:.0%} of a run's")


def plot(folders: Sequence[Path], path: Path) -> None:
    """What each arm adds to plain training's held-out losses; a point for a seed, a bar for the 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(folders), 4), layout="constrained")
    panels = figure.subplots(1, len(folders), squeeze=False)[0]
    settings = {setting_of(folder) for folder in folders}
    arms = [arm for arm in ARMS if arm != plain_of(arm) and any(is_of(setting, arm) for setting in settings)]
    arms.remove(BLIND)
    for axes, folder in zip(panels, folders, strict=True):
        found = Comparison(folder)
        kinds = {"image-related words": found.related, "other words": ~found.related}
        axes.axvline(0, color="0.7", linewidth=1)
        for number, (kind, mask) in enumerate(kinds.items()):
            for place, arm in enumerate(arms):
                if (change := found.change(arm, mask)) is None:
                    continue
                at, color = place + 0.3 * number - 0.15, f"C{number}"
                axes.plot((change.low, change.high), (at, at), color=color, linewidth=4, alpha=0.35)
                axes.plot(change.seeds, [at] * len(change.seeds), "o", markersize=4, color=color)
            axes.plot([], [], "o", color=f"C{number}", label=kind)
        axes.set_xscale("symlog", linthresh=0.1)
        ticks = (-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 4)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.set_yticks(range(len(arms)), arms if axes is panels[0] else [""] * len(arms))
        axes.set(title=found.setting, xlabel="held-out loss − plain training's, nats", ylim=(len(arms) - 0.5, -0.5))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folders = [folder.absolute() for folder in options.folders]
    for folder in folders:
        table(folder)
    if options.plot:
        plot(folders, options.plot)


if __name__ == "__main__":
    main()
