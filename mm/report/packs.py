"""The packs of a step as the model sees them: documents coloured, media in place, loss weights shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from PIL import Image as PillowImage

from mm import media
from mm.packing.collate import Document
from mm.sample import Image, Modality, Sample
from mm.tokenizers.text import TextTokenizer

THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are shown alike: words with a loss weight, or one media item.

    text: what is shown; thumbnail: data URL of a picture, or empty
    tokens: how many of the stream; weight: loss weight of each as a target
    """

    modality: str
    text: str
    tokens: int
    weight: float
    thumbnail: str = ""


@dataclass(frozen=True)
class DocumentView:
    name: str
    length: int
    runs: tuple[Run, ...]
    note: str = ""


@dataclass(frozen=True)
class PackView:
    number: int
    capacity: int
    documents: tuple[DocumentView, ...]

    @property
    def tokens(self) -> int:
        return sum(document.length for document in self.documents)

    @property
    def fill(self) -> float:
        return self.tokens / self.capacity


def view_document(name: str, sample: Sample, document: Document, tokenizer: TextTokenizer) -> DocumentView:
    """A document as coloured runs, in stream order."""
    parts = list(sample.media)
    starts = {item.start: (item, part) for item, part in zip(document.items, parts, strict=True)}
    runs: list[Run] = []
    at = 0
    while at < len(document):
        if at in starts:
            item, part = starts[at]
            label = f"{item.modality.label} {'×'.join(map(str, item.grid))} → {item.length} tokens"
            thumbnail = _thumbnail(part.data) if item.modality is Modality.IMAGE else ""
            runs.append(Run(item.modality.label, label, item.length, 0.0, thumbnail))
            at += item.length
            continue
        end = at + 1
        while end < len(document) and end not in starts and document.weights[end] == document.weights[at]:
            end += 1
        text = tokenizer.decode(document.tokens[at:end].tolist())
        runs.append(Run("text", text, end - at, float(document.weights[at])))
        at = end
    return DocumentView(name, len(document), tuple(runs))


def render_packs(packs: Sequence[PackView], *, title: str, subtitle: str) -> str:
    """A self-contained HTML page."""
    template = resources.files("mm.report").joinpath("templates/packs.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda value: f"{value:,}"
    heaviest = max((run.weight for pack in packs for document in pack.documents for run in document.runs), default=1.0)
    return environment.from_string(template).render(
        packs=packs, title=title, subtitle=subtitle, heaviest=max(heaviest, 1e-9)
    )


def _thumbnail(data: bytes) -> str:
    """A small JPEG as a data URL."""
    picture = media.decode(Image(data))
    assert isinstance(picture, PillowImage.Image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
