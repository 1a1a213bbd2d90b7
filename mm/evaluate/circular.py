"""CircularEval: a question counts only if it is answered rightly under every rotation of its options (MMBench,
arXiv 2307.06281).

For answers by letter. A likelihood of the option's text does not see the order, so there plain accuracy is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mm.evaluate.suite import ROTATION_OFFSET, Question, Suite


def rotations(question: Question) -> tuple[Question, ...]:
    """The question with its N options turned by 0 … N − 1 places; rotation k has index + k · 10⁶.

    Raises:
        ValueError: the index is 10⁶ or more, so that the rotations could not be told apart.
    """
    if question.index >= ROTATION_OFFSET:
        raise ValueError(f"question {question.index} cannot be rotated: its index must be below {ROTATION_OFFSET}")
    count = len(question.options)
    return tuple(
        replace(
            question,
            index=question.index + turn * ROTATION_OFFSET,
            options=question.options[turn:] + question.options[:turn],
            answer=(question.answer - turn) % count,
        )
        for turn in range(count)
    )


def group(suite: Suite, question: Question) -> tuple[Question, ...]:
    """The rotations of a question: those that the suite holds, or else all N."""
    held = suite.groups[question.index]
    return held if len(held) > 1 else rotations(question)


def with_rotations(suite: Suite) -> Suite:
    """The suite with every rotation as a row, to be written under a name with ``circular`` for VLMEvalKit."""
    questions = (rotation for question in suite.first_rotations for rotation in group(suite, question))
    return replace(suite, name=f"{suite.name}_circular", questions=tuple(questions))


def group_is_right(questions: Sequence[Question], letters: Sequence[str | None]) -> bool:
    """Whether the letter extracted for every rotation is the right one; no letter is wrong."""
    return all(letter == question.letter for question, letter in zip(questions, letters, strict=True))
