"""The report of a run: one page that a person reads from top to bottom, and that needs nothing else.

    run folders ─▶ History ─┐
    Results ───────────────┼─▶ sentences, charts, bars ─template─▶ report.html
    Suite, packs ──────────┘

Every figure on the page stands in ``metrics.jsonl``, ``results.json`` or ``answers.jsonl``, or is a mean
over the reports of a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.evaluate.report import FIGURES, Answered, Results, Summary
from mm.evaluate.suite import LETTERS, Suite
from mm.media import BrokenMedia
from mm.packing.hashing import shuffled
from mm.report.charts import Bar, Chart, Point, Stack, line_chart, share_stack
from mm.report.history import History, Stage
from mm.report.packs import PackView, heaviest
from mm.report.page import counted, duration, milliseconds, percent, render, short
from mm.report.pictures import data_url, thumbnail
from mm.report.samples import GUIDANCE, Drawn

__all__ = ["Stage", "report_of_run", "run_page"]

SAMPLES = 20  # questions shown with their pictures
DOCUMENTS = 12  # of a pack that are shown in full
PICTURE = 200  # pixels of the longer side

ROWS = {
    "accuracy": ("The model", "model"),
    "shuffled images": ("shown another picture", "control"),
    "text only": ("shown no picture", "control"),
    "nearest captions": ("Captions of similar pictures", "baseline"),
    "linear probe": ("Linear probe of the encoder", "baseline"),
}
"""Rows of `FIGURES` that are bars: what they are called here, and their kind."""

OF_SOME_RUNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "expert_choice/validation_loss": ("Validation loss where experts look ahead", "{:.3f}".format),
    "router_agreement": ("Auxiliary routers agree with the choice", percent),
    "tokens_without_expert": ("Tokens that no expert took, mean of the layers", percent),
    "loss/routers": ("Loss of auxiliary routers", "{:.3f}".format),
    "validation/psnr": ("PSNR of reconstructions", "{:.2f} dB".format),
    "validation/utilisation": ("Codes that occur", percent),
    "validation/perplexity": ("Perplexity of codes", "{:.1f}".format),
}
"""Figures of runs with auxiliary routers, and of tokenizers: what they are called here, and how they are written."""

PANELS = (("All questions", ""), ("Easy", "easy"), ("Hard", "hard"))


def run_page(
    title: str, stages: Sequence[Stage], suite: Suite, results: Results, packs: Sequence[PackView] = ()
) -> str:
    """The report of training stages and of the evaluation of what came out.

    Args:
        packs: shown as they are, with their `origin` as a title.

    Raises:
        FileNotFoundError: a stage's folder is not one of a training run.
        ValueError: a stage has not reported yet.
    """
    histories = [History.read(stage) for stage in stages]
    return render(
        "run.html",
        **_training(title, histories),
        told=[_told_results(results.summary), _told(histories)],
        tiles=[*_headline(results.summary), *_effort(histories)],
        scores=_scores(results),
        categories=_categories(results.summary),
        samples=_samples(suite, results),
        evaluation=_evaluation(results.summary),
        results=results.summary,
        drawn=(),
        packs=packs,
        heaviest=heaviest(packs),
        documents=DOCUMENTS,
    )


def report_of_run(folder: Path, drawn: Sequence[Drawn] = ()) -> str:
    """The report of one training run, without any evaluation.

    Args:
        drawn: what the model makes of held-out pictures and captions, see `mm.report.samples`.

    Raises:
        FileNotFoundError: the folder is not one of a training run.
        ValueError: the run has not reported yet.
    """
    history = History.read(Stage(folder.name, folder))
    return render(
        "run.html",
        **_training(history.recipe.name, [history]),
        told=[_told([history])],
        tiles=[*_fidelity(history), *_effort([history])],
        results=None,
        drawn=drawn,
        guidance=GUIDANCE,
        packs=(),
    )


# Training


@dataclass(frozen=True)
class Tile:
    """A figure that stands alone, with what it is and what it is to be held against."""

    figure: str
    label: str
    note: str = ""


def _training(title: str, histories: Sequence[History]) -> dict[str, Any]:
    return {
        "title": title,
        "histories": histories,
        "losses": [_losses(history) for history in histories],
        "facts": _facts(histories),
        "reconstructions": [_reconstructions(history) for history in histories if history.pictures],
        "unit": "Loss per picture" if histories[-1].autoencoder else "Loss in nats per token that bears loss",
        "parts_of_loss": [_parts_of_loss(history) for history in histories],
        "weights": [_weights(history) for history in histories],
        "times": [_time(history) for history in histories if history.time],
        "memory": [_memory(history) for history in histories if history.memory],
        "flops": [_flops(history) for history in histories],
    }


def _losses(history: History) -> Chart:
    return line_chart({"training": history.points("loss"), "validation": history.points("validation_loss")})


def _parts_of_loss(history: History) -> list[tuple[str, str, str]]:
    """(name, training, validation) of every source and modality."""
    parts = history.parts_of_loss.items()
    return [(name.replace("/", " "), _ends(training), _ends(validation)) for name, (training, validation) in parts]


@dataclass(frozen=True)
class Weighed:
    """Loss weights of a run's tokens, and for each bin (weight, share, its width in percent of the longest, loss)."""

    label: str
    effective: str
    bins: tuple[tuple[str, str, float, str], ...]


def _weights(history: History) -> Weighed | None:
    if (weights := history.weights) is None:
        return None
    most = max(one.share for one in weights.bins)
    rows = [(one.label, percent(one.share), 100 * one.share / most, _ends(one.loss)) for one in weights.bins]
    return Weighed(history.name, percent(weights.effective), tuple(rows))


@dataclass(frozen=True)
class Breakdown:
    """Parts of a whole of one run: share and figure of each, and the shares over steps if they are known."""

    label: str
    parts: dict[str, tuple[float, str]]
    over_steps: Stack | None = None


def _time(history: History) -> Breakdown:
    seconds = history.throughput.seconds / history.steps
    parts = {
        phase: (share, f"{milliseconds(seconds * share)} a step") for phase, share in history.throughput.time.items()
    }
    over_steps = share_stack([report["step"] for report in history.reports], history.time)
    return Breakdown(history.name, parts, over_steps)


def _memory(history: History) -> Breakdown:
    peak = sum(history.memory.values())
    return Breakdown(history.name, {part: (size / peak, f"{short(size)}B") for part, size in history.memory.items()})


def _flops(history: History) -> Breakdown:
    rate = history.throughput
    parts = {part: (share, f"{short(share * rate.flops_per_second)}FLOP/s") for part, share in rate.flops.items()}
    return Breakdown(history.name, parts)


def _facts(histories: Sequence[History]) -> dict[str, list[str]]:
    """Rows of the table of throughput: one value a stage."""
    rates = [history.throughput for history in histories]
    rows = {
        "Steps": [f"{history.steps:,}" for history in histories],
        "Tokens, media included": [f"{history.tokens:,}" for history in histories],
        "Time in steps": [duration(rate.seconds) for rate in rates],
        "Tokens per second": [f"{rate.tokens_per_second:,.0f}" for rate in rates],
        "Fill of the packs": [percent(rate.fill) for rate in rates],
        "Time waiting for data": [percent(rate.time.get("data", 0.0)) for rate in rates],
        "Peak memory of a process": [f"{short(h.peak_memory)}B" if h.peak_memory else "–" for h in histories],
        "FLOP/s": [short(rate.flops_per_second) for rate in rates],
    }
    for name, label in (("mfu", "MFU (of the data sheet)"), ("mfu_of_measured", "Share of a measured product")):
        shares = [rate.share_of_peak for rate in rates]
        if any(share and share[0] == name for share in shares):
            rows[label] = [percent(share[1]) if share and share[0] == name else "–" for share in shares]
    rows["Training loss, first → last"] = [_ends(history.points("loss")) for history in histories]
    if any(history.points("validation_loss") for history in histories):
        rows["Validation loss, first → last"] = [_ends(history.points("validation_loss")) for history in histories]
    for name, (label, value) in OF_SOME_RUNS.items():
        if any(history.points(name) for history in histories):
            rows[f"{label}, first → last"] = [_ends(history.points(name), value) for history in histories]
    if any(history.broken for history in histories):
        rows["Broken samples"] = [_broken(history) for history in histories]
    if any(sum(history.counts("skipped_updates")) for history in histories):
        rows["Skipped updates"] = [f"{sum(history.counts('skipped_updates')):,}" for history in histories]
    if any(history.events for history in histories):
        rows["Events in the ledger"] = [f"{len(history.events):,}" for history in histories]
    rows["Machine"] = [history.versions.get("device", "–") for history in histories]
    return rows


def _broken(history: History) -> str:
    """How many samples were broken, and which share of all."""
    return f"{history.broken:,} of {history.samples:,} ({percent(history.broken / max(history.samples, 1))})"


def _ends(points: Sequence[Point], worded: Callable[[float], str] = "{:.3f}".format) -> str:
    """The first value and the last."""
    if not points:
        return "–"
    last = worded(points[-1][1])
    return last if len(points) == 1 else f"{worded(points[0][1])} → {last}"


def _reconstructions(history: History) -> list[tuple[int, str]]:
    """(step, data URL) of what the first validation showed and the last."""
    steps = sorted({min(history.pictures), max(history.pictures)})
    return [(step, data_url(history.pictures[step].read_bytes(), "PNG")) for step in steps]


def _told(histories: Sequence[History]) -> list[str]:
    """What was trained, on what and for how long, in sentences."""
    last = histories[-1]
    stages = "one stage" if len(histories) == 1 else f"{len(histories)} stages"
    if last.autoencoder:
        return [f"{last.autoencoder}, a tokenizer, was trained in {stages}.", *map(_told_stage, histories)]
    encoders = _listed([f"{encoder} for {name}" for name, encoder in last.encoders.items()])
    joined = f"{last.language_model} was joined with {encoders} and" if encoders else f"{last.language_model} was"
    return [f"{joined} trained in {stages}.", *map(_told_stage, histories)]


def _told_stage(history: History) -> str:
    sources = _listed([f"{name} ({options.card})" for name, options in history.recipe.data.sources.items()])
    but = f" (except what matches “{_listed(history.exceptions)}”)" if history.exceptions else ""
    frozen = f", with {_listed(history.frozen)} frozen" if history.frozen else ""
    validation = history.points("validation_loss")
    loss = f"; the loss on held-out data ended at {validation[-1][1]:.2f}" if validation else ""
    if decibels := history.points("validation/psnr"):
        loss += f", and its pictures come back with a PSNR of {decibels[-1][1]:.1f} dB"
    return (
        f"Stage {history.name} trained {_listed(history.trained)}{but}{frozen}: {counted(history.steps, 'step')} on "
        f"{short(history.tokens)} tokens of {sources} in {duration(history.throughput.seconds)}{loss}."
    )


def _fidelity(history: History) -> list[Tile]:
    """How well a tokenizer gives pictures back; nothing of other models."""
    decibels, used = history.points("validation/psnr"), history.points("validation/utilisation")
    if not (decibels and used):
        return []
    return [Tile(f"{decibels[-1][1]:.1f} dB", "PSNR of reconstructions", f"{percent(used[-1][1])} of the codes occur")]


def _effort(histories: Sequence[History]) -> list[Tile]:
    seconds = sum(history.throughput.seconds for history in histories)
    tokens = sum(history.tokens for history in histories)
    steps = sum(history.steps for history in histories)
    return [
        Tile(
            short(tokens),
            "tokens trained on",
            f"{counted(steps, 'step')}, {short(tokens / max(seconds, 1e-9))} a second",
        ),
        Tile(duration(seconds), "of training", histories[-1].versions.get("device", "")),
    ]


def _listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


# Evaluation


@dataclass(frozen=True)
class Panel:
    """Bars of one kind of questions; `gain` says what the right picture adds over another one."""

    title: str
    questions: int
    bars: tuple[Bar, ...]
    gain: str = ""


@dataclass(frozen=True)
class Option:
    letter: str
    text: str
    score: str
    right: bool
    chosen: bool


@dataclass(frozen=True)
class Shown:
    """A question as it is shown: `verdict` is right, wrong or tied."""

    picture: str
    question: str
    category: str
    difficulty: str
    verdict: str
    options: tuple[Option, ...]
    said: str


def _value(summary: Summary, name: str) -> float | None:
    return summary.get(name, summary["baselines"].get(name))


def _bar(summary: Summary, name: str, label: str, kind: str, chance: float) -> Bar | None:
    value = _value(summary, name)
    if value is None:
        return None
    interval = summary["intervals"].get(name)
    return Bar(label, value, (interval[0], interval[1]) if interval else None, chance, kind)


def _scores(results: Results) -> list[Panel]:
    summary, panels = results.summary, []
    for number, (title, difficulty) in enumerate(PANELS):
        found = [_bar(summary, FIGURES[row][number], *ROWS[row], summary["chance"]) for row in ROWS]
        bars = tuple(bar for bar in found if bar)
        asked = sum(difficulty in ("", answer.difficulty) for answer in results.answers)
        if bars and asked:
            panels.append(Panel(title, asked, bars, _gain(summary, FIGURES["accuracy − shuffled"][number])))
    if summary["generation_questions"]:
        worded = (
            _bar(summary, "accuracy_generation", "One order of the options", "model", summary["chance"]),
            _bar(summary, "circular", "Every order right (circular)", "model", summary["chance_circular"]),
        )
        bars = tuple(bar for bar in worded if bar)
        panels.append(Panel("Answered in its own words", summary["generation_questions"], bars))
    return panels


def _gain(summary: Summary, name: str) -> str:
    value = summary.get(name)
    if value is None:
        return ""
    low, high = summary["intervals"].get(name, (None, None))
    interval = f" ({_points(low)} to {_points(high)})" if low is not None and high is not None else ""
    return f"{_points(value)}{interval} points"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _told_results(summary: Summary) -> list[str]:
    """How well the model chooses, and what that is to be held against, in sentences."""
    accuracy = percent(summary["accuracy_likelihood"]) + " of the time" + _interval(summary, "accuracy_likelihood")
    told = [
        f"On {counted(summary['questions'], 'question')} about {counted(summary['pictures'], 'picture')} the model "
        f"chooses the right option {accuracy}.",
        f"Guessing gives {percent(summary['chance'])}, the same model shown another picture "
        f"{percent(summary['shuffled_images'])}, and shown none {percent(summary['text_only'])}.",
    ]
    baselines = [
        f"{label} {percent(summary['baselines'][name])}"
        for name, label in (
            ("nearest_captions", "the captions of similar pictures give"),
            ("linear_probe", "a linear probe gives"),
        )
        if summary["baselines"].get(name) is not None
    ]
    if baselines:
        told.append(f"With the encoder alone and no language model, {_listed(baselines)}.")
    return told


def _interval(summary: Summary, name: str) -> str:
    if name not in summary["intervals"]:
        return ""
    low, high = summary["intervals"][name]
    return f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"


def _headline(summary: Summary) -> list[Tile]:
    against = f"chance {percent(summary['chance'])}"
    if "accuracy_likelihood" in summary["intervals"]:
        low, high = summary["intervals"]["accuracy_likelihood"]
        against = f"{100 * low:.1f} to {100 * high:.1f}; {against}"
    accuracy = Tile(percent(summary["accuracy_likelihood"]), "of the questions right", against)
    gain = summary["accuracy_minus_shuffled"]
    low, high = summary["intervals"].get("accuracy_minus_shuffled", (None, None))
    spread = f"{_points(low)} to {_points(high)}; " if low is not None and high is not None else ""
    return [accuracy, Tile(_points(gain), "points gained by the right picture", f"{spread}over another one")]


def _categories(summary: Summary) -> list[Bar]:
    """Accuracy of every category, the best first."""
    found = sorted(summary["categories"].items(), key=lambda each: (-each[1]["accuracy"], each[0]))
    return [
        Bar(name, each["accuracy"], None, summary["chance"], "model", f"{each['questions']:,}") for name, each in found
    ]


def _samples(suite: Suite, results: Results) -> list[Shown]:
    """Questions drawn by the suite's seed, as many of them right as in the whole, no picture twice."""
    order = [
        results.answers[number] for number in shuffled(len(results.answers), suite.settings.seed, "report").tolist()
    ]
    right = [answer for answer in order if answer.right == 1]
    other = [answer for answer in order if answer.right < 1]
    mistakes = round(SAMPLES * len(other) / len(order))
    mistakes = min(max(mistakes, min(2, len(other))), SAMPLES - min(2, len(right)))
    chosen = _distinct(right, SAMPLES - mistakes, set())
    chosen += _distinct(other, mistakes, {answer.picture for answer in chosen})
    texts = {question.index: question.text for question in suite.first_rotations}
    place = {answer.index: number for number, answer in enumerate(order)}
    chosen.sort(key=lambda answer: place[answer.index])
    return [_shown(answer, texts[answer.index], suite.pictures[answer.picture]) for answer in chosen]


def _distinct(answers: Sequence[Answered], most: int, seen: set[str]) -> list[Answered]:
    """The first answers whose pictures differ, from each other and from those seen."""
    chosen: list[Answered] = []
    seen = set(seen)
    for answer in answers:
        if len(chosen) < most and answer.picture not in seen:
            chosen.append(answer)
            seen.add(answer.picture)
    return chosen


def _shown(answer: Answered, question: str, picture: bytes) -> Shown:
    best = max(answer.scores)
    options = tuple(
        Option(
            letter, text, f"{score - best:.1f}".replace("-", "−"), letter == answer.answer, letter == answer.prediction
        )
        for letter, text, score in zip(LETTERS, answer.options, answer.scores, strict=False)
    )
    try:
        small = thumbnail(picture, PICTURE)
    except BrokenMedia:
        small = ""
    verdict = "right" if answer.right == 1 else "wrong" if answer.right == 0 else "tied"
    said = answer.generated[0].strip() if answer.generated else ""
    return Shown(small, question, answer.category, answer.difficulty, verdict, options, said)


def _evaluation(summary: Summary) -> str:
    """What the figures rest on, as text."""
    shown = {"score", "prompt", "letter_prompt", "letters", "max_tokens", "resamples", "seed"}
    shown |= {"suite", "suite_fingerprint", "suite_made", "shuffled_with_the_same_answer", "rules", "about", "versions"}
    return json.dumps({name: value for name, value in summary.items() if name in shown}, indent=2, ensure_ascii=False)
