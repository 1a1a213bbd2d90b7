"""Is a card sound? Its shards, splits, duplicates, licence and statistics, for `mm data check`.

    card ─▶ shards of every split ─survey─▶ broken samples ─┐
                                  └─digests─▶ duplicates ───┼─▶ findings, statistics ─▶ tables
    licence, split names, what the card says of itself ─────┘

A finding is *wrong* where training or evaluating on the card would be: samples that cannot be used, or that several
splits share. Others are worth knowing only: a dataset may well ask five questions about one picture.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from rich.console import Group
from rich.table import Table

from mm.data.card import Card, CardError
from mm.data.duplicates import MOST_BITS, NEAR_BITS, NEAR_COLOURS, equal_groups, near_pairs
from mm.data.labels import place_name
from mm.data.survey import Survey, survey_shards
from mm.sample import Modality
from mm.terminal import printable, styled

SHOWN = 3
"""Samples that a line of the table names."""

LICENCES = (
    "CC0-1.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-3.0",
    "CDLA-Permissive-2.0",
    "ODC-By-1.0",
    "ODbL-1.0",
    "PDDL-1.0",
    "Apache-2.0",
    "MIT",
)
"""SPDX identifiers that datasets have, for suggestions."""

_NO_LICENCE = re.compile(r"\W*|(unknown|none|null|todo|tbd|n/?a|unspecified|other)\W*", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
STATISTICS = ("samples", "pictures", "recordings", "seconds", "clouds", "points", "characters")
"""What is measured of a split. Pictures, recordings and clouds are counted once however many samples share them;
seconds are those of the recordings, points those of the clouds."""

_COUNTED = {
    Modality.IMAGE: ("pictures", None),
    Modality.SPEECH: ("recordings", "seconds"),
    Modality.POINT: ("clouds", "points"),
}
_ITEMS = {Modality.IMAGE: "picture", Modality.SPEECH: "recording", Modality.POINT: "point cloud"}


@dataclass(frozen=True)
class Finding:
    """Something about a card.

    wrong: whether it makes the check fail
    where: split or splits, or ``card``
    count: how many samples, media or shards it concerns
    examples: the first of them
    """

    wrong: bool
    where: str
    what: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a check found.

    shards, refused: number of shards, and of records that are no samples, by split
    near: bits by which the hashes of near-duplicates differ at most
    counts: what `STATISTICS` names, by split
    statistics: those counts as they belong into the card; a split that could not be read as a whole has none
    """

    card: Card
    findings: tuple[Finding, ...]
    shards: dict[str, int]
    refused: dict[str, int]
    near: int
    counts: dict[str, dict[str, int]]
    statistics: dict[str, dict[str, int]]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.wrong for finding in self.findings)

    def tables(self) -> Iterator[Table]:
        """What is there, and what was found."""
        yield self._counts_table()
        if self.findings:
            yield self._findings_table()

    def _counts_table(self) -> Table:
        table = Table("split", title=f"what {printable(self.card.name)} holds", title_justify="left")
        kinds = [kind for kind in STATISTICS if any(counts.get(kind) for counts in self.counts.values())]
        for column in ("shards", *kinds, "unusable"):
            table.add_column(column, justify="right")
        for split, counts in self.counts.items():
            numbers = [self.shards[split], *(counts.get(kind, 0) for kind in kinds), self.refused[split]]
            table.add_row(printable(split), *(f"{number:,}" for number in numbers))
        return table

    def _findings_table(self) -> Table:
        rule = f"≈ resembles: hashes within {self.near} of 64 bits, colours within {NEAR_COLOURS} of 255"
        caption = rule if any("≈" in example for finding in self.findings for example in finding.examples) else None
        table = Table(title="what was found", title_justify="left", caption=caption, caption_justify="left")
        table.add_column("")
        table.add_column("number", justify="right")
        table.add_column("where: what, such as", overflow="fold")
        for finding in sorted(self.findings, key=lambda finding: not finding.wrong):
            mark = styled(("wrong", "red")) if finding.wrong else "note"
            lines = [f"{finding.where}: {finding.what}", *(styled((one, "dim")) for one in finding.examples)]
            table.add_row(mark, f"{finding.count:,}", Group(*lines))
        return table


def check_card(
    card: Card,
    split: str | None = None,
    processes: int | None = None,
    near: int = NEAR_BITS,
    progress: bool = True,
) -> Report:
    """Reads and decodes all that a card names, or one split of it.

    Takes about a kilobyte of memory a picture.

    Args:
        processes: how many work in parallel, 0 for this one only; None takes the cores there are, at most 16.
        near: bits by which the hashes of near-duplicates differ at most, 0 to 11.

    Raises:
        CardError: no such split, or another distance.
    """
    if not 0 <= near <= MOST_BITS:
        raise CardError(f"near-duplicates within {near} bits: give a distance of 0 to {MOST_BITS}")
    if split is not None and split not in card.splits:
        raise CardError(f"{card.path}: no split {split!r}, the card has {', '.join(card.splits)}")
    processes = min(16, len(os.sched_getaffinity(0))) if processes is None else processes
    shards: dict[str, list[str]] = {}
    findings = [*licence_findings(card.licence), *_name_findings(card)]
    for name in [split] if split else card.splits:
        try:
            shards[name] = card.shards(name)
        except (CardError, OSError) as error:
            findings.append(Finding(True, printable(name), printable(str(error), 400), 1))
    every = list(dict.fromkeys(itertools.chain.from_iterable(shards.values())))
    surveys = survey_shards(card, every, processes, progress)
    findings += _shared_shards(shards)
    for name, paths in shards.items():
        findings += _damage(name, {path: surveys[path] for path in paths})
    corpus = _Corpus(shards, surveys)
    findings += corpus.findings(near)
    counts = corpus.counts()
    whole = {
        name: {kind: number for kind, number in counts[name].items() if number or kind == "samples"}
        for name, paths in shards.items()
        if not any(surveys[path].unreadable for path in paths)
    }
    return Report(
        card,
        (*findings, *_outdated(card, whole)),
        {name: len(paths) for name, paths in shards.items()},
        {name: sum(b.count for path in paths for b in surveys[path].broken.values()) for name, paths in shards.items()},
        near,
        counts,
        whole,
    )


def licence_findings(licence: str) -> Iterator[Finding]:
    """A licence that is missing, or that no program can tell."""
    shown = printable(licence)
    if _NO_LICENCE.fullmatch(licence.strip()):
        yield Finding(
            True, "card", f"licence: {shown!r} says nothing; name the licence that the data was released by", 1
        )
        return
    try:
        canonicalize_license_expression(licence)
    except InvalidLicenseExpression:
        close = difflib.get_close_matches(licence.upper(), {name.upper(): name for name in LICENCES}, 1, 0.6)
        meant = next((name for name in LICENCES if close and name.upper() == close[0]), None)
        hint = f"; is {meant} meant?" if meant else ", such as CC-BY-4.0; programs cannot tell what it allows"
        yield Finding(False, "card", f"licence: '{shown}' is no SPDX identifier{hint}", 1)


def _name_findings(card: Card) -> Iterator[Finding]:
    odd = [name for name in card.splits if not _SPLIT_NAME.fullmatch(name)]
    if odd:
        what = "name of a split that is not of letters, digits, `_`, `.` and `-` only"
        yield Finding(True, "card", what, len(odd), tuple(map(printable, odd[:SHOWN])))
    if "train" not in card.splits:
        yield Finding(False, "card", "no split is called `train`, which recipes take unless they name another", 1)


def _shared_shards(shards: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    splits: dict[str, list[str]] = defaultdict(list)
    for split, paths in shards.items():
        for path in paths:
            splits[os.path.realpath(path) if os.path.exists(path) else path].append(split)  # noqa: PTH110
    shared: dict[str, list[str]] = defaultdict(list)
    for path, names in splits.items():
        if len(set(names)) > 1:
            shared[" and ".join(dict.fromkeys(names))].append(path)
    for names, paths in shared.items():
        examples = tuple(place_name(path, "") for path in paths[:SHOWN])
        yield Finding(True, printable(names), "the same shard in several splits", len(paths), examples)


def _damage(split: str, surveys: Mapping[str, Survey]) -> Iterator[Finding]:
    """Shards that cannot be read, and records that are no samples, by kind."""
    unreadable = [(path, survey.unreadable) for path, survey in surveys.items() if survey.unreadable]
    if unreadable:
        examples = tuple(f"{place_name(path, '')}: {printable(reason, 200)}" for path, reason in unreadable[:SHOWN])
        yield Finding(True, printable(split), "shard that cannot be read to its end", len(unreadable), examples)
    counts: Counter[str] = Counter()
    examples_of: dict[str, list[str]] = defaultdict(list)
    for path, survey in surveys.items():
        for kind, broken in survey.broken.items():
            counts[kind] += broken.count
            for key, reason in broken.examples[:SHOWN]:
                detail = reason.partition(": ")[2]
                examples_of[kind].append(place_name(path, key) + (f", {printable(detail, 100)}" if detail else ""))
    for kind, count in counts.most_common():
        yield Finding(True, printable(split), printable(kind, 200), count, tuple(examples_of[kind][:SHOWN]))
    if not any(survey.keys for survey in surveys.values()):
        yield Finding(True, printable(split), "the split is empty: it holds no usable sample", 1)


def _outdated(card: Card, measured: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    for split, counts in measured.items():
        said = card.statistics.get(split, {})
        if not isinstance(said, dict):
            yield Finding(False, printable(split), f"statistics.{split} is no mapping; --write replaces it", 1)
            continue
        differing = {kind: said[kind] for kind in counts if kind in said and said[kind] != counts[kind]}
        if differing:
            lines = [f"{kind}: {printable(str(said))}, found {counts[kind]:,}" for kind, said in differing.items()]
            what = "the card's statistics are others than what is there"
            yield Finding(False, printable(split), what, len(differing), tuple(lines))


# --------------------------------------------------------------------------------------------------------- duplicates


class _Corpus:
    """All samples of all splits, numbered through, and their media.

    split: (n,) int64 number of the split of every sample
    samples, texts: (n,) uint64 digests; media: (m,) uint64 digests, owners: (m,) samples, modalities: (m,)
    """

    def __init__(self, shards: Mapping[str, Sequence[str]], surveys: Mapping[str, Survey]) -> None:
        self.splits = tuple(shards)
        self.shards = [path for paths in shards.values() for path in paths]
        self.surveys = [surveys[path] for path in self.shards]
        sizes = [len(survey.keys) for survey in self.surveys]
        self.of_shard = np.repeat(np.arange(len(shards)), [len(paths) for paths in shards.values()])
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.split = np.repeat(self.of_shard, sizes).astype(np.int64)
        first = np.concatenate([[0], np.cumsum([len(survey.media) for survey in self.surveys])]).astype(np.int64)
        self.samples = self._joined([survey.samples for survey in self.surveys], np.uint64)
        self.texts = self._joined([survey.texts for survey in self.surveys], np.uint64)
        self.media = self._joined([survey.media for survey in self.surveys], np.uint64)
        self.modalities = self._joined([survey.modalities for survey in self.surveys], np.int8)
        self.owners = self._joined([s.owners + at for s, at in zip(self.surveys, self.starts, strict=False)], np.int64)
        self.pictures = self._joined([s.pictures + at for s, at in zip(self.surveys, first, strict=False)], np.int64)

    def counts(self) -> dict[str, dict[str, int]]:
        """What `STATISTICS` names, by split."""
        sizes = self._joined([survey.sizes for survey in self.surveys], np.float64)
        counts = {}
        for number, split in enumerate(self.splits):
            found = dict.fromkeys(STATISTICS, 0)
            found["samples"] = int((self.split == number).sum())
            within = np.flatnonzero(self.split[self.owners] == number)
            different = within[np.unique(self.media[within], return_index=True)[1]]
            for modality, (kind, measure) in _COUNTED.items():
                chosen = different[self.modalities[different] == modality]
                found[kind] = len(chosen)
                if measure is not None:
                    found[measure] = round(float(sizes[chosen].sum()))
            shards = zip(self.of_shard.tolist(), self.surveys, strict=True)
            found["characters"] = sum(survey.characters for of, survey in shards if of == number)
            counts[split] = found
        return counts

    @staticmethod
    def _joined(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *arrays])

    def findings(self, near: int) -> Iterator[Finding]:
        """Duplicates, each counted under the strongest name that it has."""
        yield from self._equal("the same sample", self.samples, np.arange(len(self.samples)), wrong=True)
        rest = ~self._in_several_splits
        for modality, name in _ITEMS.items():
            chosen = np.flatnonzero((self.modalities == modality) & rest[self.owners])
            yield from self._equal(f"the same {name} (file)", self.media[chosen], self.owners[chosen], wrong=True)
        with_media = np.zeros(len(self.samples), bool)
        with_media[self.owners] = True
        different = np.unique(self.samples, return_index=True)[1]
        chosen = different[(rest & with_media)[different]]
        yield from self._equal("the same words beside other media", self.texts[chosen], chosen, wrong=False)
        yield from self._near(near)

    @cached_property
    def _in_several_splits(self) -> np.ndarray:
        """(n,) bool: samples that another split has too."""
        shared = np.zeros(len(self.samples), bool)
        for group in equal_groups(self.samples):
            if len(set(self.split[group].tolist())) > 1:
                shared[group] = True
        return shared

    def _equal(self, what: str, digests: np.ndarray, owners: np.ndarray, *, wrong: bool) -> Iterator[Finding]:
        """Findings for equal digests; several splits with one digest are wrong, if `wrong`, one split never is."""
        counts: Counter[tuple[int, ...]] = Counter()
        examples: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for group in equal_groups(digests):
            members = np.unique(owners[group])
            splits, firsts = np.unique(self.split[members], return_index=True)
            if len(members) < 2:
                continue  # one sample that holds a file twice
            where = tuple(splits.tolist())
            across = len(splits) > 1
            counts[where] += len(splits) if across else len(members) - 1
            if len(examples[where]) < SHOWN:
                named = members[firsts] if across else members[:2]
                examples[where].append(" = ".join(map(self._name, named.tolist())))
        for where, count in sorted(counts.items(), key=lambda item: (-len(item[0]), -item[1])):
            across = len(where) > 1
            extent = "in several splits" if across else "repeated within the split"
            yield Finding(wrong and across, self._where(where), f"{what}, {extent}", count, tuple(examples[where]))

    def _near(self, bits: int) -> Iterator[Finding]:
        """Pictures that resemble each other without being the same file."""
        _, first = np.unique(self.media[self.pictures], return_index=True)
        hashes = self._joined([survey.hashes for survey in self.surveys], np.uint64)[first]
        colours = np.concatenate([np.empty((0, 16, 16, 3), np.uint8), *(survey.colours for survey in self.surveys)])
        found = near_pairs(hashes, colours[first], bits)
        pairs = self.owners[self.pictures[first]][found.pairs]
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        splits = np.sort(self.split[pairs], axis=1)
        for low, high in np.unique(splits, axis=0).tolist():
            here = pairs[(splits == (low, high)).all(axis=1)]
            across = low != high
            extent = "in two splits" if across else "within the split"
            names = tuple(f"{self._name(one)} ≈ {self._name(other)}" for one, other in here[:SHOWN].tolist())
            where = self._where((low, high) if across else (low,))
            count = len(np.unique(here))
            yield Finding(across, where, f"pictures that resemble each other, {extent}", count, names)
        if not found.complete:
            what = "near-duplicates were not searched to the end: too many pictures are alike, such as blank ones"
            yield Finding(False, "all splits", what, 1)

    def _where(self, splits: Sequence[int]) -> str:
        return " and ".join(printable(self.splits[split]) for split in splits)

    def _name(self, sample: int) -> str:
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return place_name(self.shards[number], self.surveys[number].keys[sample - int(self.starts[number])])
