"""Files of a tar that no field of a card reads: which kinds, how many, and an example of each.

A key ends at the first dot of a name, so that ``photo 2.0.jpg`` and ``photo 2.1.jpg`` are one record, of which a card
reads one picture. Nothing is wrong with the tar, and the samples that are lost can only be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mm.sample import encodable_key

KINDS = 8
"""Kinds of files that are kept of a shard, the most frequent ones."""

HINT = "a key ends at the first dot of a file's name: rename files whose names hold further dots"


class Unread(NamedTuple):
    """Files of one kind that no field reads.

    kind: what follows the last dot of their names
    files: how many; beside: records in which the card reads another file of this kind
    example: the name of one, of such a record if there is any
    """

    kind: str
    files: int
    beside: int
    example: str

    @property
    def sentence(self) -> str:
        """What was counted, in words."""
        files = f"{self.files:,} {'.' + self.kind!r} file{'s are' if self.files > 1 else ' is'}"
        said = f"{files} read by no field of the card, such as {self.example!r}"
        records = f"{self.beside:,} record{'s' if self.beside > 1 else ''}"
        return f"{said}; in {records} the card reads one of several such files" if self.beside else said


@dataclass
class UnreadFiles:
    """A count over the records of a shard.

    read: names of the fields that the card may read
    """

    read: Collection[str]
    files: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, fields: Mapping[str, Any]) -> None:
        """Counts the files of a record."""
        unread = [name for name in fields if name not in self.read]
        if not unread:
            return
        kinds_read = {_kind(name) for name in fields if name in self.read}
        kinds = {_kind(name): name for name in reversed(unread)}
        self.files.update(map(_kind, unread))
        for kind, name in kinds.items():
            if kind in kinds_read and not self.beside[kind]:
                self.examples[kind] = f"{key}.{name}"
            self.examples.setdefault(kind, f"{key}.{name}")
            self.beside[kind] += kind in kinds_read

    def found(self) -> tuple[Unread, ...]:
        """The kinds of files that were left, the most frequent first."""
        return tuple(
            Unread(encodable_key(kind), files, self.beside[kind], encodable_key(self.examples[kind]))
            for kind, files in self.files.most_common(KINDS)
        )


def total(shards: Sequence[Sequence[Unread]]) -> list[Unread]:
    """The counts of several shards together, the most frequent first."""
    kinds: dict[str, Unread] = {}
    for one in (one for shard in shards for one in shard):
        known = kinds.get(one.kind, Unread(one.kind, 0, 0, one.example))
        example = one.example if one.beside and not known.beside else known.example
        kinds[one.kind] = Unread(one.kind, known.files + one.files, known.beside + one.beside, example)
    return sorted(kinds.values(), key=lambda one: -one.files)


def unread_lines(found: Sequence[Unread]) -> Iterator[str]:
    """A line for each kind, and where names may be the cause, how they are read."""
    yield from (one.sentence for one in found)
    if any(one.beside for one in found):
        yield HINT


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
