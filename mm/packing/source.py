"""What the plan asks of a source: numbers about the rows of some shards, and never all of them at once.

    shards 3, 17, 20 ──load──▶ Rows: tokens, items, FLOPs of each row      from columns on disk, or indexed just then

A row is (shard, row in the shard), so that naming it needs no knowledge of the shards before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np

from mm.sample import MEDIA_PARTS

QUANTITIES = tuple(modality.label for modality in MEDIA_PARTS)
"""What is counted of a sample unless a source says otherwise: items per modality."""

Unit = Literal["tokens", "samples", "epochs"]
"""What the weights of sources are shares of: the tokens of the mixture, its samples, or passes over each source."""

EXCLUSIONS = ("dropped by `mm data drop`", "filtered out by `where`", "`where` asks for a value that is missing")
"""Why a row can be left out on purpose."""

DROPPED, FILTERED, MISSING = 1, 2, 3
"""`EXCLUSIONS` as numbers, for `Rows.excluded`."""


class PlanError(ValueError):
    """Sources that cannot be planned, or not with these options; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbers about the n rows of some shards, shard after shard.

    shards: (S,) int, rows of each shard; ``sum(shards) == n``
    tokens: (n, C) int32 document length under each choice of text; 0 where the row is broken or has none
    counts: (n, M) int, items of each quantity
    media_end: (n, C) int32 tokens up to the end of the last media item, needed to truncate; None if there are no media
    first_label: (n, C) int32 tokens before the first one that is learned, or fewer if truncation cannot cut it off; the
        length of the document where none is. None if the objective needs no labels
    media_tokens: (n, M) int tokens of each quantity, for reports; None if unknown
    media_flops: (n,) float64 FLOPs of encoders and adapters; None if there are no media
    excluded: (n,) uint8 `DROPPED`, `FILTERED`, `MISSING`, or 0 for a row that takes part; None if all do
    stamps: (S,) uint32 of what the rows of each shard are, see `PackRows`; None if they cannot change
    """

    shards: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    media_end: np.ndarray | None = None
    first_label: np.ndarray | None = None
    media_tokens: np.ndarray | None = None
    media_flops: np.ndarray | None = None
    excluded: np.ndarray | None = None
    stamps: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows, choices = self.tokens.shape
        expected = {
            "counts": (rows, self.counts.shape[-1]),
            "media_end": (rows, choices),
            "first_label": (rows, choices),
            "media_tokens": self.counts.shape,
            "media_flops": (rows,),
            "excluded": (rows,),
            "stamps": self.shards.shape,
        }
        if self.shards.sum() != rows:
            raise ValueError(f"shards hold {self.shards.sum()} rows, the tokens are for {rows}")
        for name, shape in expected.items():
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"{name} is for {values.shape}, expected {shape}: the tokens are for {rows} rows")

    @property
    def starts(self) -> np.ndarray:
        """(S + 1,) int64 first row of every shard, then n."""
        return np.concatenate([[0], np.cumsum(self.shards)]).astype(np.int64)

    def of_shards(self, shards: Sequence[int]) -> Rows:
        """The rows of these shards, in this order."""
        starts = self.starts
        chosen = np.concatenate([np.arange(*starts[shard : shard + 2]) for shard in shards])
        parts = {
            one.name: values[np.asarray(shards) if one.name in ("shards", "stamps") else chosen]
            for one in fields(self)
            if (values := getattr(self, one.name)) is not None
        }
        return Rows(**parts)


@dataclass(frozen=True, eq=False)
class Source:
    """A source of samples.

    name: unique among the sources of a recipe
    shards: how many
    load: the rows of the shards with these numbers, in this order
    choice_probabilities: (C,) float; a row draws among the choices whose length is not 0
    fingerprint: of everything that the rows are computed from: shards, tokenizer, transforms
    shard_rows: (S,) rows of each shard; None if the shards are indexed while the plan goes on
    weight: share of the mixture in the plan's unit, relative to the other sources'; either all sources have one or none
    epochs: how often each row is seen, at most if there are weights; None: as the plan says
    selection: what `Rows.excluded` is computed from, by names that a reader of `PlanChanged` understands; JSON values
    quantities: what `Rows.counts` counts, M names
    """

    name: str
    shards: int
    load: Callable[[Sequence[int]], Rows]
    choice_probabilities: np.ndarray
    fingerprint: str
    shard_rows: np.ndarray | None = None
    weight: float | None = None
    epochs: float | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    quantities: tuple[str, ...] = QUANTITIES

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.choice_probabilities, np.float64)
        if (probabilities < 0).any() or not np.isclose(probabilities.sum(), 1):
            raise PlanError(f"source {self.name}: choice probabilities {probabilities.tolist()} do not add up to 1")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise PlanError(
                    f"source {self.name}: {name} must be a number greater than 0, not {value}; "
                    "to leave a source out, remove it from the recipe"
                )

    @classmethod
    def of_rows(cls, name: str, rows: Rows, choice_probabilities: np.ndarray, fingerprint: str, **options: Any) -> Self:
        """A source whose rows are in memory."""
        return cls(name, len(rows.shards), rows.of_shards, choice_probabilities, fingerprint, rows.shards, **options)

    @property
    def rows(self) -> int | None:
        """How many rows there are; None if that is not known yet."""
        return None if self.shard_rows is None else int(np.sum(self.shard_rows))
