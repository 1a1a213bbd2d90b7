"""Whatever strangers write into a file, reading it ends soon, in little memory, and in a sentence or a counted skip.

A failure names its case: ``python -m tests.fuzz tar 17`` repeats it, ``--keep FOLDER`` leaves its input to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.workers import Case, verdicts

KNOWN: dict[str, tuple[int, ...]] = {
    "tar": (41,),  # markup in a reason
    "parquet": (6, 18, 21, 58),  # durations, strings that are no UTF-8, dates beyond the year 9999, NULs printed
    "jsonl": (16, 69, 86),  # NUL and carriage return printed, half a surrogate pair
    "card": (5, 21),  # nested too deep
    "recipe": (3, 7, 31, 43, 48, 62),  # nested too deep, control characters, absurd numbers, values of another kind
}
"""Seeds of each kind that failed on earlier code."""


def wrong(cases: Sequence[Case]) -> list[str]:
    """What went wrong, a line a case."""
    found = list(verdicts(cases))
    assert len(found) == len(cases)
    return [f"{one.kind} {one.seed}: {one.error}" for one in found if one.error is not None]


def test_mutated_inputs_end_in_sentences_and_counted_skips() -> None:
    cases = [(kind, seed) for kind in KINDS for seed in {*KNOWN.get(kind, ()), *range(20)}]
    assert not (failures := wrong(cases)), "\n\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_1500_mutated_inputs_of_a_kind_end_in_sentences_and_counted_skips(kind: str) -> None:
    assert not (failures := wrong([(kind, seed) for seed in range(1500)])), "\n\n".join(failures)
