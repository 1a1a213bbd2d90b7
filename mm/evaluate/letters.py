"""What an answer in free words says: a letter, or yes or no, by the rules of ms-vlmeval 0.0.20.

Its results are called exact matching there. Newer versions add patterns ("answer is X"), so name the version beside a
figure. The rules read oddly; they are followed to the letter because published figures rest on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mm.evaluate.suite import LETTERS

RULES_OF = "ms-vlmeval 0.0.20, exact matching"
REFUSED = "Z"
"""The letter that stands for no answer."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED_CALL = "Failed to obtain answer via API"
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 5


def extract_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that the answer names, ``Z`` for a refusal, or None if it names none or several.

    A letter counts only if exactly one option's letter occurs as a word of its own and its first occurrence is among
    the last four words, so that the article in "A picture of a dog" is no answer. Otherwise the one option whose text
    occurs in the answer is taken, unless the answer is longer than twice all options together.
    """
    return _named_letter(answer, len(options)) or _named_text(answer, options)


def _named_letter(answer: str, options: int) -> str | None:
    if FAILED_CALL in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return REFUSED
    words = answer.translate(SEPARATORS).split()
    named = [letter for letter in LETTERS[:options] if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - LAST_WORDS:
        return named[0]
    return REFUSED if not named and REFUSED in words else None


def _named_text(answer: str, options: Sequence[str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options)):
        return None
    named = [letter for letter, option in zip(LETTERS, options, strict=False) if option.lower() in answer]
    return named[0] if len(named) == 1 else None


PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
DIGIT_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
PERIODS_REMOVED = 32
"""The reference passes `re.UNICODE`, whose value is 32, where `re.sub` expects a count."""


def extract_yes_no(answer: str) -> Literal["Yes", "No"] | None:
    """Yes or No if exactly one of the two is a word of the answer, else None (the reference's ``Unknown``)."""
    answer = answer.lower()
    digits = DIGIT_COMMA.search(answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if digits or beside_space else " ")
    words = PERIOD.sub("", cleaned, count=PERIODS_REMOVED).split()
    match "yes" in words, "no" in words:
        case True, False:
            return "Yes"
        case False, True:
            return "No"
        case _:
            return None
