"""The packs of a step as the model sees them: documents coloured, media in place, loss weights shown.

plan ─pack─▶ rows ─read, decode─▶ Document ─turns, spans─▶ PackView ─template─▶ page
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm.packing.collate import Document, Processor
from mm.packing.source import QUANTITIES
from mm.packing.windows import PlannedSample
from mm.report.page import counted, percent, render, thousands
from mm.report.turns import Span, Turn, turns_of
from mm.sample import BrokenSample, Modality, Sample
from mm.train.dataset import PlannedData
from mm.train.preview import planned
from mm.train.recipe import Recipe

MODALITIES = tuple(modality.label for modality in Modality)


@dataclass(frozen=True)
class DocumentView:
    """A document of `length` tokens. Without turns it could not be read; `note` says so, or that its text was cut."""

    name: str
    length: int
    turns: tuple[Turn, ...]
    note: str = ""

    @property
    def spans(self) -> list[Span]:
        return [span for turn in self.turns for span in turn.spans]


class Segment(NamedTuple):
    """A piece of a pack's bar, in tokens: a span, or a whole document that could not be read (``broken``)."""

    start: int
    width: int
    kind: str
    weight: float


@dataclass(frozen=True)
class PackView:
    """A pack as documents; `origin` says where it is from, such as ``demo-pretrain, step 0``."""

    number: int
    capacity: int
    documents: tuple[DocumentView, ...]
    origin: str = ""

    @property
    def tokens(self) -> int:
        return sum(document.length for document in self.documents)

    @property
    def fill(self) -> float:
        return self.tokens / self.capacity

    @property
    def spans(self) -> list[Span]:
        return [span for document in self.documents for span in document.spans]

    @property
    def by_modality(self) -> dict[str, int]:
        """Tokens of the modalities that occur."""
        counts: Counter[str] = Counter()
        for span in self.spans:
            counts[span.modality] += span.tokens
        return {name: counts[name] for name in MODALITIES if counts[name]}

    @property
    def with_loss(self) -> int:
        """Tokens that are targets with a weight."""
        return sum(span.tokens for span in self.spans if span.weight > 0)

    @property
    def heaviest(self) -> float:
        """The greatest loss weight of a token, 0 if none bears loss."""
        return max((span.weight for span in self.spans), default=0.0)

    @property
    def segments(self) -> list[Segment]:
        """The spans of the pack in stream order."""
        segments: list[Segment] = []
        start = 0
        for document in self.documents:
            for span in document.spans or (Span("broken", "", document.length),):
                segments.append(Segment(start, span.tokens, span.modality, span.weight))
                start += span.tokens
        return segments


# Pages


def inspect_page(data: PlannedData, step: int, packs_shown: int = 8) -> str:
    """A page with the packs of a global batch, the first `packs_shown` of them in full.

    Args:
        step: number of the global batch, from 0.

    Raises:
        IndexError: the plan ends before this step.
    """
    packs = _packs_of_step(data, step)
    shown = [view_pack(data, number) for number in packs[:packs_shown]]
    return render_packs(shown, title=f"Global batch {thousands(step)}", subtitle=_describe(data, packs, len(shown)))


def render_packs(packs: Sequence[PackView], *, title: str, subtitle: str) -> str:
    """A self-contained HTML page of packs."""
    return render("packs.html", packs=packs, title=title, subtitle=subtitle, heaviest=heaviest(packs))


def heaviest(packs: Sequence[PackView]) -> float:
    """The greatest loss weight of a token in any of the packs: what is shown in the strongest colour."""
    return max((pack.heaviest for pack in packs), default=0.0)


def _describe(data: PlannedData, packs: Sequence[int], shown: int) -> str:
    """The whole global batch in a line, from the plan alone."""
    rows = [data.plan.pack(number) for number in packs]
    tokens = sum(int(pack.length.sum()) for pack in rows)
    media = sum((data.plan.media_tokens(number) for number in packs), np.zeros(len(QUANTITIES), np.int64))
    kinds = [f"{thousands(count)} {name}" for name, count in zip(QUANTITIES, media.tolist(), strict=True) if count]
    facts = [
        counted(len(packs), "pack") + (f", the first {shown} shown" if shown < len(packs) else ""),
        counted(sum(len(pack.row) for pack in rows), "document"),
        f"{thousands(tokens)} tokens" + (f", of them {' and '.join(kinds)}" if kinds else ""),
        f"fill {percent(tokens / (len(packs) * data.plan.options.capacity))}",
    ]
    return " · ".join(facts)


# From the plan to views


def view_packs(recipe: Recipe, step: int, shown: int) -> list[PackView]:
    """The first packs of a global batch of a recipe, from the plan in its run folder, which is made if need be."""
    data = planned(recipe)
    return [view_pack(data, number, f"{recipe.name}, step {step}") for number in _packs_of_step(data, step)[:shown]]


def view_pack(data: PlannedData, number: int, origin: str = "") -> PackView:
    """One pack of the plan, its samples read and decoded; a sample that cannot be used says why."""
    documents = [_document_of(data, planned) for planned in data.plan.pack(number).samples()]
    return PackView(number, data.plan.options.capacity, tuple(documents), origin)


def view_document(
    name: str, sample: Sample, processor: Processor, weigh: Callable[[Document], Document] | None = None, note: str = ""
) -> DocumentView:
    """A sample as a document, cut and weighed by `weigh` if that is given.

    Raises:
        BrokenMedia: an item of the sample cannot be decoded.
    """
    document = processor.document(sample)
    if weigh is not None:
        document = weigh(document)
    return DocumentView(name, len(document), turns_of(sample, document, processor.text), note)


def _packs_of_step(data: PlannedData, step: int) -> list[int]:
    """Numbers of the packs of a global batch, without the empty ones that fill up the last."""
    data.plan.ensure((step + 1) * data.plan.packs_per_batch)
    return [number for number in data.plan.batch(step) if number >= 0]


def _document_of(data: PlannedData, planned: PlannedSample) -> DocumentView:
    source, shard, row, stamp, choice, _, length, truncated = planned
    name = f"{data.names[source]} · {Path(data.samples[source].shards[shard]).name} · row {row}"
    try:
        sample = data.samples[source].sample(shard, row, choice, stamp)
        name = f"{data.names[source]} · {sample.key}"
        note = "text cut at the end" if truncated else ""
        weigh = partial(data.sources[source].weighting.weigh, shard=shard, row=row, choice=choice, length=length)
        return view_document(name, sample, data.blueprint.processor, weigh, note)
    except BrokenSample as error:
        return DocumentView(name, length, (), f"broken, replaced by padding: {error}")
