"""Words out of a record's fields: decoded, checked, and without what only looks like words.

Byte order marks and NULs at either end carry no meaning, and a text in which nothing shows is blank. A NUL inside a
text, or a text that UTF-8 cannot hold, is an error of the record.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from mm.data.mapping.fields import BrokenField, kind_of, look_up, missing
from mm.data.mapping.record import Fields
from mm.sample import BrokenSample

PADDING = "\0\ufeff"
"""Characters that programs put around a text: NULs of fields of fixed size, and byte order marks."""

_AROUND = PADDING + "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace())
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | set(map(chr, range(0xFE00, 0xFE10)))
"""Letters and marks that show nothing: fillers of Hangul and Khmer, the blank of braille, variation selectors."""
_HIDDEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Categories of control and format characters, such as U+200B, and of white space."""


def words_of(value: Any, path: str) -> str:
    """The words in a value, without `PADDING` around them.

    Raises:
        BrokenField: it is no text, not UTF-8, or holds a NUL among its words.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenField(f"text is not UTF-8: {path!r}: {error.reason} at byte {error.start}") from error
    if not isinstance(value, str):
        raise BrokenField(f"not a text: {path!r} holds a {kind_of(value)}")
    words = value.strip(PADDING)
    try:  # JSON may hold half a surrogate pair, on which a tokenizer would fail later
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenField(f"text is not UTF-8: {path!r}: {error.reason} at character {error.start}") from error
    if "\0" in words:
        raise BrokenField(f"text with a NUL: {path!r}, at character {words.index(chr(0))}; is it binary, or UTF-16?")
    return words


def first_words(fields: Fields, paths: tuple[str, ...]) -> str:
    """Text of the first field that holds any and can be read, without white space around it.

    Raises:
        BrokenSample: there is none; names the first field that is broken, if none is, one that is blank.
    """
    broken, blank = None, None
    for path in paths:
        try:
            value = look_up(fields, path)
            if value is None:
                continue
            words = words_of(value, path).strip(_AROUND)
        except BrokenField as error:
            broken = broken or error
            continue
        if not is_blank(words):
            return words
        blank = path
    if broken is not None:
        raise broken
    raise BrokenSample(missing(paths, fields) if blank is None else f"empty text: {blank!r}")


def is_blank(words: str) -> bool:
    """Whether nothing in a text shows: it is of white space, control and format characters, and fillers."""
    return all(letter.isspace() or letter in _FILLERS or unicodedata.category(letter) in _HIDDEN for letter in words)
