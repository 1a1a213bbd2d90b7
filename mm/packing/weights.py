"""Loss weights of a source's tokens: named factors, computed for each document and multiplied.

    row ─column─▶ values ─align─▶ (L,) a value a token ─┐
    sample ─▶ Document, role weights (L,) ──────────────┴─Factor, Factor, …─▶ product (L,) ─▶ Batch.weights

Whatever a factor looks at is known when the document is laid out, so that weights are a vector beside the labels, and
packing, accumulation and world size change nothing: the objective divides by Σw of the global batch. Their order does
not matter, since each is computed from the document alone.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mm.configure import RecipeError
from mm.data import columns
from mm.data.columns import ColumnError, ColumnReader
from mm.data.index import Index, SplitSamples
from mm.packing.collate import Document
from mm.sample import Modality

REFERENCE = "reference"
"""The column of a reference model's log-probabilities, see `reference_type`."""


HEAVIEST = 1_000_000
"""The largest weight that a recipe can name: products of several stay finite in float32."""


def reference_type() -> pa.DataType:
    """Of the values in the column of a reference: under each choice of the card, for the words that bear loss in order,

    ids: CRC-32 of their ids, so that other words are noticed; see `digest`
    log_probabilities: one each, in nats
    """
    return pa.list_(pa.struct([("ids", pa.uint32()), ("log_probabilities", pa.list_(pa.float16()))]))


def reference_fingerprint(tokenizer: str, model: str) -> str:
    """Under which the column of a reference is kept, see `mm.data.columns`."""
    return f"tokenizer {tokenizer}, {model}"


def words_with_loss(document: Document) -> np.ndarray:
    """(L,) bool: the tokens that a model of words alone has a probability for, without the ends of items of codes."""
    words = (document.weights > 0) & (document.modality == Modality.TEXT)
    for item in document.items:
        words[item.start : item.start + item.length] = False
    return words


def digest(ids: np.ndarray) -> int:
    """CRC-32 of token ids."""
    return zlib.crc32(ids.astype("<i4").tobytes())


def targets(document: Document) -> np.ndarray:
    """(L,) bool: the tokens that are predicted with loss. The first has nothing before it."""
    bears = document.weights > 0
    bears[:1] = False
    return bears


# -------------------------------------------------------------------------------------------------------------- factors


class Factor(ABC):
    """A factor of the weights of a source's tokens; ``weights:`` of a source in a recipe names some.

    column: name of the column that it reads, None if it reads none
    """

    column: str | None = None

    def mutes(self, modality: Modality) -> bool:
        """Whether every token of a modality gets 0, whatever the document, so that nothing is learned from it."""
        return False

    @abstractmethod
    def of(self, document: Document, values: np.ndarray) -> np.ndarray | float:
        """Factors ≥ 0 of a document's tokens: (L,) or one for all. They count where `targets` are.

        Args:
            document: cut to what is trained on.
            values: (L,) float64 of the column, NaN where it says nothing; all NaN without a column.
        """


@dataclass(frozen=True)
class Scale(Factor):
    """The same for every token of the source."""

    weight: float

    def __post_init__(self) -> None:
        _check_number("weight", self.weight)

    def mutes(self, modality: Modality) -> bool:
        return self.weight == 0

    def of(self, document: Document, values: np.ndarray) -> float:
        return self.weight


@dataclass(frozen=True)
class Modalities(Factor):
    """By the modality of the token, 1 where none is named. The begin and end of an item's codes are text."""

    weights: dict[str, float]

    def __post_init__(self) -> None:
        allowed = [modality.label for modality in Modality]
        for name, weight in self.weights.items():
            if name not in allowed:
                raise RecipeError(f"weights of modalities name {name!r}; expected {', '.join(allowed)}")
            _check_number(name, weight)

    def mutes(self, modality: Modality) -> bool:
        return self.weights.get(modality.label, 1.0) == 0

    def of(self, document: Document, values: np.ndarray) -> np.ndarray:
        table = np.array([self.weights.get(modality.label, 1.0) for modality in Modality])
        return table[document.modality]


@dataclass(frozen=True)
class Length(Factor):
    """How a sample's share of the loss grows with its x targets (InternVL 2.5, arXiv 2412.05271, section 3.2).

    balance: `token` 1, every token counts alike; `sample` 1/x, every sample; `square` 1/√x, between the two
    """

    balance: Literal["token", "sample", "square"]

    def of(self, document: Document, values: np.ndarray) -> float:
        return max(1, int(targets(document).sum())) ** {"token": 0.0, "sample": -1.0, "square": -0.5}[self.balance]


@dataclass(frozen=True)
class Column(Factor):
    """What a column says: a number for the sample, or a list of one for each of its words that bear loss."""

    column: str

    def of(self, document: Document, values: np.ndarray) -> np.ndarray:
        factors = np.where(np.isnan(values), 1.0, values)
        if not (np.isfinite(factors).all() and (factors >= 0).all()):
            raise ColumnError(f"column {self.column!r} holds weights below 0 or that are not finite")
        return factors


@dataclass(frozen=True)
class Keep(Factor):
    """Selects tokens: 1 for a share of each sample's words, 0 for the others (Rho-1, arXiv 2404.07965, by any score).

    share: of the words that the column has a value for, rounded up
    order: whether those with the `lowest` values stay, such as the least probable ones, or the `highest`
    """

    share: float
    column: str = REFERENCE
    order: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"share is {self.share}; expected one above 0 and up to 1")

    def of(self, document: Document, values: np.ndarray) -> np.ndarray:
        scored = np.flatnonzero(targets(document) & ~np.isnan(values))
        ranked = np.argsort(values[scored] if self.order == "lowest" else -values[scored], kind="stable")
        factors = np.ones(len(document))
        factors[scored[ranked[math.ceil(self.share * len(scored)) :]]] = 0.0
        return factors


@dataclass(frozen=True)
class Reference(Factor):
    """A function of the probability that a model of words alone gives each word. Others, such as codes, weigh 1.

    Subclass it for a function of your own.

    normalise: `caption`: the weights of a sample's words add up to their number (PRIOR). `batch`: they stay as they
        are, and Σw of the global batch is all that divides
    column: of the reference, see ``mm data score``
    """

    normalise: Literal["caption", "batch"] = "caption"
    column: str = REFERENCE

    @abstractmethod
    def weight(self, log_probabilities: np.ndarray) -> np.ndarray:
        """(n,) float64 weights ≥ 0 of words by their log-probabilities in nats, float64."""

    def of(self, document: Document, values: np.ndarray) -> np.ndarray:
        words = targets(document) & ~np.isnan(values)
        weights = self.weight(values[words])
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{type(self).__name__} gives weights that are not finite or below 0")
        if self.normalise == "caption" and (total := weights.sum()) > 0:  # 0: the reference knows it all by heart
            weights = weights * (len(weights) / total)
        factors = np.ones(len(document))
        factors[words] = weights
        return factors


@dataclass(frozen=True)
class Prior(Reference):
    """``w = (1 − p)^α`` (PRIOR, arXiv 2505.08971). α = 0 is plain next-token prediction, bit for bit."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha)

    def weight(self, log_probabilities: np.ndarray) -> np.ndarray:
        return (-np.expm1(log_probabilities)) ** self.alpha


@dataclass(frozen=True)
class InversePrior(Reference):
    """``w = min(p^−α, w_max)``, ours: where `Prior` levels off at improbable words, this one goes on."""

    alpha: float = 0.5
    w_max: float = 10.0

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha)
        _check_number("w_max", self.w_max)

    def weight(self, log_probabilities: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(-self.alpha * log_probabilities, math.log(self.w_max) if self.w_max else -math.inf))


@dataclass(frozen=True)
class PriorTable(Reference):
    """A weight for each range of p, ours.

    edges: ascending, between the ranges: of n edges there are n + 1 ranges, and p at an edge is above it
    """

    edges: tuple[float, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(self.edges) or len(self.weights) != len(self.edges) + 1:
            raise RecipeError(
                f"a table of {len(self.edges)} ascending edges has {len(self.edges) + 1} weights; found edges "
                f"{list(self.edges)} and {len(self.weights)} weights"
            )
        for weight in self.weights:
            _check_number("weights", weight)

    def weight(self, log_probabilities: np.ndarray) -> np.ndarray:
        return np.array(self.weights)[np.searchsorted(self.edges, np.exp(log_probabilities), side="right")]


def _check_number(name: str, value: float) -> None:
    if not 0 <= value <= HEAVIEST:
        raise RecipeError(f"{name} is {value}; expected a number from 0 to {HEAVIEST:,}")


# ----------------------------------------------------------------------------------------------- from columns to tokens


class Weighting:
    """The factors of a source's tokens. Pickles small, for workers.

    Args:
        factors: by the name that the recipe gives each.
        tokenizer: fingerprint of the text's.
    """

    def __init__(self, factors: Mapping[str, Factor], samples: SplitSamples, tokenizer: str) -> None:
        self.factors = dict(factors)
        self._samples, self._tokenizer = samples, tokenizer
        self._readers: dict[str, ColumnReader] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Weighting, (self.factors, self._samples, self._tokenizer)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        return sorted({factor.column for factor in self.factors.values() if factor.column is not None})

    def mutes(self, modality: Modality) -> bool:
        """Whether no token of a modality has weight, whatever the document."""
        return any(factor.mutes(modality) for factor in self.factors.values())

    def check(self, index: Index) -> None:
        """Raise `ColumnError`, with the command to run, unless all columns are there for all rows of an index."""
        for name in self.columns:
            fingerprint = self._fingerprint(index, name)
            for number, problem in columns.problems(index, name, fingerprint).items():
                raise ColumnError(f"column {name!r} of {index.shards[number].shard}: {problem}. {_remedy(index)}")

    def weigh(self, document: Document, shard: int, row: int, choice: int, length: int) -> Document:
        """The first `length` tokens of a whole document, with the factors of their weights.

        Raises:
            ColumnError: a column does not belong to the words of the document.
        """
        values = {name: self._values(name, document, shard, row, choice)[:length] for name in self.columns}
        document = document.cut(length)
        if not self.factors:
            return document
        silent, product = np.full(len(document), np.nan), np.ones(len(document))
        for factor in self.factors.values():
            product *= factor.of(document, values[factor.column] if factor.column is not None else silent)
        return replace(document, factors=product.astype(np.float32))

    def _values(self, name: str, document: Document, shard: int, row: int, choice: int) -> np.ndarray:
        entry = self._samples.entry(shard)
        if name not in self._readers:
            fingerprint = self._fingerprint(self._samples.index([shard]), name)
            self._readers[name] = ColumnReader(self._samples.folder, name, fingerprint)
        try:
            return aligned(self._readers[name].value(entry, row), document, choice)
        except ColumnError as error:
            raise ColumnError(f"column {name!r} of {entry.shard}, row {row}: {error}") from error

    def _fingerprint(self, index: Index, name: str) -> str:
        """Of the column of this name that belongs to the tokenizer, if it says to which it belongs."""
        found = columns.fingerprints(index, name)
        mine = reference_fingerprint(self._tokenizer, "")
        fitting = [one for one in found if not one.startswith("tokenizer ") or one.startswith(mine)]
        if len(fitting) == 1:
            return fitting[0]
        where = f"column {name!r} of {index.card.name}/{index.split}"
        if fitting:
            raise ColumnError(
                f"{where} could be {len(fitting)} columns: {'; '.join(fitting)}. Delete those that you do not mean, "
                f"under {index.folder / 'columns'}, or compute them under other names"
            )
        if found:
            raise ColumnError(
                f"{where} belongs to other tokenizers than the recipe's ({self._tokenizer}): {'; '.join(found)}. "
                f"{_remedy(index)}"
            )
        raise ColumnError(f"{where} was not computed. {_remedy(index)}")


def _remedy(index: Index) -> str:
    return (
        f"A reference is written by `mm data score {index.card.path} --split {index.split} --folder {index.folder} "
        "--with mm.score.reference.ReferenceLM`, with the tokenizer of the recipe; see docs/prior.md"
    )


def aligned(value: pa.Scalar, document: Document, choice: int) -> np.ndarray:
    """(L,) float64 what a value of a column says of each token of a whole document, NaN where it says nothing.

    Args:
        value: a number for all tokens; a list with one for each of `words_with_loss`; a list of such lists, one for
            each choice of the card; or as `reference_type`.

    Raises:
        ColumnError: null, another kind of value, or not for these words.
    """
    if value.is_valid and pa.types.is_list(value.type) and pa.types.is_nested(value.type.value_type):
        if choice >= len(value.values):
            raise ColumnError(f"{len(value.values)} choices of text, and choice {choice} is asked for")
        value = value.values[choice]
    words = words_with_loss(document)
    if value.is_valid and pa.types.is_struct(value.type):
        if value["ids"].as_py() != digest(document.tokens[words]):
            raise ColumnError("computed for other words than the sample has now; compute it again")
        value = value["log_probabilities"]
    if not value.is_valid or not pa.types.is_list(value.type):
        return np.full(len(document), _number(value.as_py()))
    listed = value.values.to_numpy(zero_copy_only=False)
    if len(listed) != words.sum():
        raise ColumnError(f"{len(listed)} values, and the sample has {words.sum()} words with loss")
    if value.values.null_count:
        raise ColumnError(f"{value.values.null_count} of {len(listed)} values are null")
    values = np.full(len(document), np.nan)
    values[words] = listed
    return values


def _number(value: Any) -> float:
    if not isinstance(value, Real):
        raise ColumnError(f"the value is {value!r}; expected a number or a list of numbers")
    return float(value)
