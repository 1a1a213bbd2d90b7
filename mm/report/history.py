"""What a run folder tells of its training: ``metrics.jsonl``, ``recipe.yaml``, ``versions.json``, ``ledger.jsonl``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from mm.objectives.next_token import BINS
from mm.train.clock import PHASES
from mm.train.meter import PARTS
from mm.train.recipe import Recipe

Point = tuple[float, float]

SHARES = ("mfu", "mfu_of_measured")
"""Names of the share of a device's peak, see `mm.train.meter.device_peak`."""

MEMORY = ("parameters", "gradients", "optimizer", "rest")
"""Parts of the memory, see `mm.train.memory`."""

PART_OF_LOSS = re.compile("(validation_)?loss/(source|modality|part)/")


@dataclass(frozen=True)
class Stage:
    """A training run of a longer story, by the name that it has there."""

    name: str
    folder: Path


class Throughput(NamedTuple):
    """Means over a run, weighted by time; validation and saving are left out.

    seconds: in steps; tokens_per_second: real tokens; fill: real of all
    time: shares of the seconds by phase, see `mm.train.clock`
    flops_per_second: of all processes; flops: shares by part
    share_of_peak: and whether that peak is a data sheet's (``mfu``) or was measured (``mfu_of_measured``)
    """

    seconds: float
    tokens_per_second: float
    fill: float
    time: dict[str, float]
    flops_per_second: float
    flops: dict[str, float]
    share_of_peak: tuple[str, float] | None


class WeightBin(NamedTuple):
    """Tokens of like weight: the share of all that they are, and their loss over steps, unweighted."""

    label: str
    share: float
    loss: list[Point]


class Weights(NamedTuple):
    """The loss weights of the n tokens of a run.

    effective: share of tokens of equal weight that would estimate a mean as well, (Σw)² / (n Σw²) (Kish 1965)
    """

    effective: float
    bins: tuple[WeightBin, ...]


@dataclass(frozen=True)
class History:
    """A run as its folder records it.

    reports: the lines of ``metrics.jsonl``; figures that were not finite are None
    events: the lines of ``ledger.jsonl``: broken samples, skipped updates, spikes
    reasons: why samples were broken, the most frequent first: (reason, how many different
        ones, the first of them)
    pictures: what validation has shown of an autoencoder, by step
    """

    name: str
    recipe: Recipe
    recipe_text: str
    reports: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    events: tuple[str, ...]
    reasons: tuple[tuple[str, int, str], ...]
    pictures: dict[int, Path]

    @classmethod
    def read(cls, stage: Stage) -> Self:
        """
        Raises:
            FileNotFoundError: the folder is not one of a training run.
            ValueError: nothing was reported yet.
        """
        folder = stage.folder
        reports = _lines(folder / "metrics.jsonl")
        if not reports:
            raise ValueError(f"{folder}/metrics.jsonl is empty: the run has not reported yet (see `log_every`)")
        ledger = _lines(folder / "ledger.jsonl") if (folder / "ledger.jsonl").exists() else []
        return cls(
            stage.name,
            Recipe.load(folder / "recipe.yaml"),
            (folder / "recipe.yaml").read_text(encoding="utf-8"),
            tuple(reports),
            json.loads((folder / "versions.json").read_text(encoding="utf-8")),
            tuple(line["event"] for line in ledger),
            _reasons(ledger),
            {int(path.stem.removeprefix("step-")): path for path in sorted((folder / "pictures").glob("step-*.png"))},
        )

    def points(self, figure: str) -> list[Point]:
        """(step, value) wherever the figure was reported and finite."""
        return [(report["step"], report[figure]) for report in self.reports if report.get(figure) is not None]

    @property
    def steps(self) -> int:
        return self.reports[-1]["step"]

    @property
    def samples(self) -> int:
        """Samples read, broken ones included."""
        return sum(self.counts("data/samples"))

    @property
    def broken(self) -> int:
        """Samples that were replaced by padding."""
        return sum(self.counts("data/broken"))

    def counts(self, figure: str) -> list[int]:
        """A figure of each report that counts something, 0 where it was not reported."""
        return [int(count or 0) for count in self._column(figure)]

    @property
    def tokens(self) -> int:
        """Real tokens seen, media included."""
        return self.reports[-1]["tokens"]

    @cached_property
    def throughput(self) -> Throughput:
        """Every report stands for the steps since the one before."""
        steps = [later - earlier for earlier, later in pairwise([0, *self._column("step")])]
        seconds = [count * each for count, each in zip(steps, self._column("seconds_per_step"), strict=True)]
        total = max(sum(seconds), 1e-9)

        def over_time(figure: str) -> float:
            return sum(time * (value or 0.0) for time, value in zip(seconds, self._column(figure), strict=True)) / total

        real = [time * value for time, value in zip(seconds, self._column("tokens_per_second"), strict=True)]
        slots = sum(tokens / fill for tokens, fill in zip(real, self._column("fill"), strict=True) if fill)
        flops = [time * value for time, value in zip(seconds, self._column("flops_per_second"), strict=True)]
        parts = {
            part: sum(all * (share or 0.0) for all, share in zip(flops, self._column(f"flops/{part}"), strict=True))
            for part in PARTS
        }
        share = next((name for name in SHARES if name in self.reports[-1]), None)
        return Throughput(
            seconds=sum(seconds),
            tokens_per_second=sum(real) / total,
            fill=sum(real) / slots if slots else 0.0,
            time={phase: spent for phase in (*PHASES, "rest") if (spent := over_time(f"time/{phase}"))},
            flops_per_second=sum(flops) / total,
            flops={part: done / sum(flops) for part, done in parts.items() if done},
            share_of_peak=(share, over_time(share)) if share else None,
        )

    @property
    def time(self) -> dict[str, list[float]]:
        """Shares of the time by phase, at every report; nothing of phases that took none."""
        return {phase: [value or 0.0 for value in self._column(f"time/{phase}")] for phase in self.throughput.time}

    @property
    def peak_memory(self) -> float | None:
        """Bytes of the process that has needed most."""
        return max((size for _, size in self.points("memory/peak")), default=None)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part when the most was needed, which add up to it; nothing where they are not known."""
        heaviest = max(self.reports, key=lambda report: report.get("memory/peak") or 0.0)
        return {part: size for part in MEMORY if (size := heaviest.get(f"memory/{part}"))}

    @property
    def parts_of_loss(self) -> dict[str, tuple[list[Point], list[Point]]]:
        """Training and validation loss of each source, modality and term of which there are several; ``source/a``, …"""
        names = {name.partition("/")[2] for report in self.reports for name in report if PART_OF_LOSS.match(name)}
        kinds = Counter(name.partition("/")[0] for name in names)
        return {
            name: (self.points(f"loss/{name}"), self.points(f"validation_loss/{name}"))
            for name in sorted(names, key=lambda name: (name.startswith("modality"), name))
            if kinds[name.partition("/")[0]] > 1
        }

    @property
    def weights(self) -> Weights | None:
        """What the loss weights of tokens were like over the run; None where all were 1."""
        told = [report for report in self.reports if report.get("weights/mean")]
        if not told:
            return None
        steps = [later - earlier for earlier, later in pairwise([0, *(report["step"] for report in told)])]

        def mean(figure: str) -> float:
            return sum(n * (report.get(figure) or 0.0) for n, report in zip(steps, told, strict=True)) / sum(steps)

        bins = [(name, mean(f"weights/tokens/{name}"), self.points(f"weights/loss/{name}")) for name in BINS]
        effective = mean("weights/mean") ** 2 / mean("weights/square") if mean("weights/square") else 0.0
        return Weights(effective, tuple(WeightBin(*one) for one in bins if one[1]))

    def _column(self, figure: str) -> list[Any]:
        return [report.get(figure) for report in self.reports]

    # ------------------------------------------------------------------------------------------ what the recipe says

    @property
    def autoencoder(self) -> str | None:
        """Name of the tokenizer that is trained; None where it is a language model."""
        options = self.recipe.model.autoencoder
        return options.tokenizer["_target_"].rpartition(".")[2] if options else None

    @property
    def language_model(self) -> str:
        options = self.recipe.model.decoder
        return Path(options.pretrained).stem if options.pretrained else "a language model from scratch"

    @property
    def encoders(self) -> dict[str, str]:
        """Name of the encoder of each modality."""
        return {
            modality: str(options.get("name") or options["_target_"].rpartition(".")[2])
            for modality, options in self.recipe.model.encoders.items()
        }

    @property
    def trained(self) -> list[str]:
        """The parts that train, in words."""
        return [words for name, words in self._parts.items() if not self._frozen(name)]

    @property
    def frozen(self) -> list[str]:
        """The parts that are frozen as a whole, in words."""
        return [words for name, words in self._parts.items() if self._frozen(name)]

    @property
    def exceptions(self) -> list[str]:
        """Patterns that freeze something within a part."""
        options = self.recipe.optim.parts
        return [
            part.match for part in options if part.freeze and not any(self._match(part.match, n) for n in self._parts)
        ]

    @property
    def _parts(self) -> dict[str, str]:
        if autoencoder := self.recipe.model.autoencoder:
            judge = {"judges.discriminator": "the discriminator"} if autoencoder.discriminator else {}
            return {"tokenizer": "the tokenizer", **judge}
        encoders = self.recipe.model.encoders
        words = {f"encoders.{name}": f"the {name} encoder" for name in encoders}
        words |= {f"adapters.{name}": f"the {name} adapter" for name in encoders}
        return words | {"decoder": "the language model"}

    def _frozen(self, name: str) -> bool:
        """Whether the first pattern that matches the whole part freezes it."""
        return next((part.freeze for part in self.recipe.optim.parts if self._match(part.match, name)), False)

    @staticmethod
    def _match(pattern: str, name: str) -> bool:
        return re.search(pattern, f"{name}.") is not None


def _reasons(ledger: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, int, str], ...]:
    """As `History.reasons`, of the lines of a ledger. Later epochs, and resumes from before a sample, name it again."""
    samples: dict[str, dict[str, None]] = {}
    for line in ledger:
        if "reason" in line:
            reason = f"{line['split']}: {line['reason']}" if "split" in line else line["reason"]
            samples.setdefault(reason, {})[line["sample"]] = None
    by_count = sorted(samples.items(), key=lambda item: -len(item[1]))
    return tuple((reason, len(names), next(iter(names))) for reason, names in by_count)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
