"""The contract of all mappings: fields of a record in, parts of a sample out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mm.sample import BrokenSample, Part, Role

Fields = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@contextmanager
def reading_a_record() -> Iterator[None]:
    """The boundary at which a record becomes a sample: whatever goes wrong in reading it is a `BrokenSample`.

    Records are untrusted, and no list of what can be wrong with one is complete: lists nested a thousand deep, numbers
    that are none. What says nothing about the record passes: a disk or a network that fails, memory that is spent.

    Raises:
        BrokenSample: the reason, with the type of the error where nobody expected it.
    """
    try:
        yield
    except (BrokenSample, OSError, MemoryError):
        raise
    except Exception as error:
        raise BrokenSample(f"unreadable record: {type(error).__name__}: {error}") from error


class RecordMapping(ABC):
    """Record to parts. `choices` are the probabilities of the alternative texts and orders, at least one.

    Under every choice a sample has the same items of each modality, in the same order among themselves: facts and codes
    of a row hold for all of its choices.
    """

    choices: tuple[float, ...]
    names_files = False
    """Whether values of a record name files of it, so that no list of fields says which files are read."""

    @abstractmethod
    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        """The parts of a sample under one of the choices.

        Raises:
            BrokenSample: the record lacks something, or holds what cannot be used.
        """

    @abstractmethod
    def paths(self) -> Iterator[str]:
        """The field paths that are read."""

    def dropped(self, fields: Fields) -> int:
        """Number of files that the record lacks and that its sample does without, because the card says so."""
        return 0
