"""What the runs of `benchmarks.moma` show, as a table in Markdown and, with a path, as a plot.

η is how many times fewer FLOPs an arm needs than a dense model for the same loss:

- on held-out data, causally: dense models of several lengths, each with its own schedule, say how many steps they need
  for the loss of the arm; between two lengths the loss is taken as linear in the logarithm of the steps.
- on training loss, as in the paper: at the step at which the arm reaches the dense run's last loss, or the dense run
  the arm's. There experts look at later tokens, and schedules have decayed unequally far.

    python -m benchmarks.moma_table [PLOT.png]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.moma import ARMS, LENGTHS, RESULTS, SEEDS, STEPS, best_rate, decoder, endpoint
from benchmarks.sweeps import read_results
from mm import configure
from mm.model.decoder import Decoder, DecoderConfig

Result = dict[str, Any]

SMOOTH = 6
"""Reports that a point of a training curve is the mean of: 30 steps."""

DOCUMENT = 96
"""Tokens of a document for which FLOPs are counted."""

PAPER = {"4t4i": "3.7 (2.6, 5.2)", "8 mixed": "3.0 (3.0, 2.8)", "4t4i, depth": "4.2 (3.4, 5.3)"}
"""η of the training loss at 1.4B and a trillion tokens, in all, of text, of images (arXiv 2407.21770, abstract)."""

TICKS = (0.25, 0.5, 1, 2, 3)

Measure = Callable[[Result], float]

MEASURES: dict[str, Measure] = {
    "all": endpoint,
    "text": lambda result: result["held_out"]["modality/text"],
    "image": lambda result: result["held_out"]["modality/image"],
}


HEADER = (
    *("arm", "parameters, M", "FLOPs", "rate", "runs"),
    *("held-out loss, causal", "text", "image", "experts look ahead", "routers agree"),
    *("η held-out", "text", "image", "η training", "text", "image", "paper's η"),
)


EQUAL_PARAMETERS = "dense, equal parameters"


class Sizes:
    """parameters: of the decoder; flops: forward, of a document, with the head"""

    def __init__(self, arm: str) -> None:
        config = configure.build({"_target_": "mm.model.decoder.DecoderConfig", **decoder(arm)}, DecoderConfig)
        with torch.device("meta"):
            model = Decoder(config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.flops = model.flops([DOCUMENT]) + model.head_flops(DOCUMENT)


def runs(results: Sequence[Result], arm: str, steps: int = STEPS) -> list[Result]:
    """The runs of an arm at its best rate, by seed."""
    rate = best_rate(results, arm)
    return [one for one in results if one["arm"] == arm and one["rate"] == rate and one["steps"] == steps]


def lengths(results: Sequence[Result], arm: str) -> list[int]:
    return sorted({one["steps"] for one in results if one["arm"] == arm and runs(results, arm, one["steps"])})


def mean(of: Sequence[Result], measure: Measure) -> float:
    return statistics.mean(measure(one) for one in of)


def dense_steps(results: Sequence[Result], loss: float, measure: Measure) -> float:
    """Steps that a dense model needs for a loss; NaN beyond the shortest and the longest run."""
    found = {steps: mean(runs(results, "dense", steps), measure) for steps in lengths(results, "dense")}
    losses, steps = zip(*sorted((loss, steps) for steps, loss in found.items()), strict=True)
    return float(np.exp(np.interp(loss, losses, np.log(steps), left=math.nan, right=math.nan)))


def eta_held_out(results: Sequence[Result], result: Result, measure: Measure) -> float:
    """Dense FLOPs for the loss of a run, over the FLOPs of the run."""
    flops = Sizes(result["arm"]).flops / Sizes("dense").flops
    return dense_steps(results, measure(result), measure) / (result["steps"] * flops)


def eta_training(results: Sequence[Result], arm: str, part: str) -> float:
    """The paper's η, of the first seed: `part` of the loss is loss (all), text or image."""
    curves = {}
    for name in ("dense", arm):
        (result,) = [one for one in runs(results, name) if one["seed"] == SEEDS[0]]
        values = np.convolve(result["curve"][part], np.ones(SMOOTH) / SMOOTH, mode="valid")
        curves[name] = np.minimum.accumulate(values), np.array(result["curve_steps"][SMOOTH - 1 :])
    (dense, dense_at), (other, other_at) = curves["dense"], curves[arm]
    flops = Sizes(arm).flops / Sizes("dense").flops
    if other[-1] <= dense[-1]:
        return float(dense_at[-1] / (other_at[np.argmax(other <= dense[-1])] * flops))
    return float(dense_at[np.argmax(dense <= other[-1])] / (other_at[-1] * flops))


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the smallest and the largest where there are several."""
    if any(math.isnan(value) for value in values):
        return "outside"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: Sequence[Result]) -> str:
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for arm in ARMS:
        if best_rate(results, arm) is None:
            continue
        for steps in lengths(results, arm):
            lines.append(row(results, arm, steps))
    return "\n".join(lines)


def row(results: Sequence[Result], arm: str, steps: int) -> str:
    found, sizes = runs(results, arm, steps), Sizes(arm)
    ahead = [endpoint(one, "by_choice") for one in found if "by_choice" in one]
    agree = [100 * one["router_agreement"] for one in found if "by_choice" in one]
    cells = [
        arm if steps == STEPS else f"{arm}, {steps} steps",
        f"{sizes.parameters / 1e6:.2f}",
        f"{sizes.flops / Sizes('dense').flops:.2f}",
        f"{found[0]['rate']:g}",
        str(len(found)),
        *(spread([measure(one) for one in found], 3) for measure in MEASURES.values()),
        spread(ahead, 3) if ahead else "–",
        f"{statistics.mean(agree):.0f} %" if agree else "–",
    ]
    held_out = [spread([eta_held_out(results, one, measure) for one in found], 2) for measure in MEASURES.values()]
    training = [f"{eta_training(results, arm, part):.2f}" for part in ("loss", "text", "image")]
    compared = arm != "dense"
    cells += [*held_out, *(training if steps == STEPS else "–––")] if compared else "––––––"
    return "| " + " | ".join([*cells, PAPER.get(arm, "") if steps == STEPS else ""]) + " |"


def plot(results: Sequence[Result], path: Path) -> None:
    """Held-out loss over FLOPs of the arms of several lengths, and of every arm at one length, each seed a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    over_flops, *by_arm = figure.subplots(1, 1 + len(MEASURES), width_ratios=[1.3, 1, 1, 1])
    for arm in LENGTHS:
        steps = lengths(results, arm)
        means = [statistics.mean(endpoint(one) for one in runs(results, arm, length)) for length in steps]
        color = "black" if arm == "dense" else None
        over_flops.plot([length / STEPS for length in steps], means, marker="o", linewidth=1, label=arm, color=color)
    over_flops.set(xscale="log", xlabel=f"FLOPs (1: a dense model's {STEPS} steps)", ylabel="held-out loss")
    over_flops.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    over_flops.minorticks_off()
    over_flops.legend(frameon=False)

    arms = [arm for arm in ARMS if best_rate(results, arm) is not None]
    for axes, (name, measure) in zip(by_arm, MEASURES.items(), strict=True):
        dense = [measure(one) for one in runs(results, "dense")]
        axes.axvspan(min(dense), max(dense), color="0.9")
        for place, arm in enumerate(arms):
            values = [measure(one) for one in runs(results, arm)]
            axes.plot(values, [place] * len(values), "o", markersize=5, alpha=0.7, color="C0" if place else "black")
        labels = [f"{arm},\n4.3 × FLOPs" if arm == EQUAL_PARAMETERS else arm for arm in arms]
        axes.set_yticks(range(len(arms)), labels if axes is by_arm[0] else [""] * len(arms), fontsize=8)
        axes.set(title=f"{name}, {STEPS} steps", xlabel="held-out loss", ylim=(len(arms) - 0.5, -0.5))
    for axes in (over_flops, *by_arm):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", nargs="?", type=Path)
    options = parser.parse_args()
    results = read_results(RESULTS)
    print(table(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
