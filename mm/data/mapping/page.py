"""An interleaved page in two lists, of texts and of pictures."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mm.data.mapping.fields import kind_of, look_up, missing, parsed, shown
from mm.data.mapping.files import from_base64
from mm.data.mapping.record import Fields, RecordMapping
from mm.data.mapping.words import is_blank, words_of
from mm.sample import BrokenSample, Image, Part, Text

PARAGRAPHS, SENTENCES = "\n\n", " "
"""What stands between neighbouring texts of a page: of one whose lists lie side by side, and of one with sentences."""


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """Where the picture of an entry of a page's list is.

    The entry itself is bytes, Hugging Face's ``{bytes, path}``, or the name of a file of the record (what follows the
    first dot of a member's name, in any case).

    file: the entry is a mapping, and this its key for the same
    numbered: instead, picture n of the page, counted from 0, is the first field that is there of ``n.<extension>``
    base64: text is not a name but the file in base64
    """

    file: str | None = None
    numbered: tuple[str, ...] = ()
    base64: bool = False

    def find(self, fields: Fields, entry: Any, number: int) -> bytes | None:
        """The file of picture `number` of a page, None if the record does not hold it.

        Raises:
            BrokenSample: the entry is of another form.
        """
        if self.numbered:
            entry = next(filter(None, (fields.get(f"{number}.{extension}") for extension in self.numbered)), None)
        elif self.file is not None:
            if not isinstance(entry, dict):
                raise BrokenSample(
                    f"broken page: picture {number} is a {kind_of(entry)}, not a mapping with {self.file!r}"
                )
            entry = entry.get(self.file)
        if isinstance(entry, dict):
            entry = entry.get("bytes")
        if isinstance(entry, str):
            entry = from_base64(entry, f"picture {number}") if self.base64 else fields.get(entry.lower())
        if not isinstance(entry, bytes | None):
            raise BrokenSample(f"no file: picture {number} of the page is a {kind_of(entry)}")
        return entry or None


class Page(RecordMapping):
    """An interleaved page in two lists, in one of two forms.

    Side by side (OBELICS, InfiMM-WebMath): lists of equal length, of which one holds something at each place and the
    other null or a blank text.
    Matched (MMC4): the entries of `images` are mappings that tell the number of the text that they stand before.

    Neighbouring texts become one part, and blank ones none; the words are left as they are but for `words.PADDING`.

    Args:
        texts: path of the list of texts.
        images: path of the list of pictures.
        files: where the pictures are.
        at: key of the text's number in the entries of a matched page, None for lists that lie side by side.
        drop: leave out a picture that the record does not hold, instead of refusing the page.
        join: stands between neighbouring texts.
    """

    choices = (1.0,)
    names_files = True

    def __init__(
        self, texts: str, images: str, files: PictureFiles, at: str | None = None, drop: bool = False, join: str = ""
    ) -> None:
        self._texts = texts
        self._images = images
        self._files = files
        self._at = at
        self._drop = drop
        self._join = join

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        found = [one for one in self._contents(fields) if one is not None]
        parts: list[Part] = []
        for is_text, group in itertools.groupby(found, lambda one: isinstance(one, str)):
            if is_text:
                parts.append(Text(self._join.join(map(str, group))))
            else:
                parts += [Image(data) for data in group if isinstance(data, bytes)]
        if not any(isinstance(part, Text) for part in parts):
            raise BrokenSample("empty text: the page holds no words, nothing to learn")
        return tuple(parts)

    def paths(self) -> Iterator[str]:
        yield self._texts
        yield self._images

    def dropped(self, fields: Fields) -> int:
        return sum(one is None for one in self._contents(fields)) if self._drop else 0

    def _contents(self, fields: Fields) -> Iterator[str | bytes | None]:
        """Texts that are not blank and pictures in the order of the page, None for a picture that is dropped."""
        texts, images = (_list(fields, path) for path in (self._texts, self._images))
        return self._side_by_side(fields, texts, images) if self._at is None else self._matched(fields, texts, images)

    def _side_by_side(self, fields: Fields, texts: list[Any], images: list[Any]) -> Iterator[str | bytes | None]:
        if len(texts) != len(images):
            raise BrokenSample(
                f"broken page: {len(texts)} {self._texts!r} beside {len(images)} {self._images!r}; lists without `at` "
                "are of equal length"
            )
        number = 0
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            words = [] if text is None else list(self._words(text))
            is_picture = image is not None and image != ""
            if words and is_picture:
                raise BrokenSample(f"broken page: a text and a picture at place {place}, where one should be null")
            if is_picture or text is None:
                yield self._picture(fields, image, number)
                number += 1
            yield from words

    def _matched(self, fields: Fields, texts: list[Any], images: list[Any]) -> Iterator[str | bytes | None]:
        before: defaultdict[int, list[bytes | None]] = defaultdict(list)
        for number, entry in enumerate(images):
            place = entry.get(self._at) if isinstance(entry, dict) else None
            if type(place) is not int or not 0 <= place < len(texts):
                raise BrokenSample(
                    f"broken page: {self._at!r} of picture {number} is {shown(place)}, of {len(texts)} texts"
                )
            before[place].append(self._picture(fields, entry, number))
        for number, text in enumerate(texts):
            yield from before[number]
            yield from self._words(text)

    def _picture(self, fields: Fields, entry: Any, number: int) -> bytes | None:
        data = self._files.find(fields, entry, number)
        if data is None and not self._drop:
            raise BrokenSample(
                f"missing picture: no bytes for picture {number} of the page, {shown(entry)}; the record has "
                f"{', '.join(sorted(fields))[:120]}. Addresses are not fetched; `missing: drop` in the card leaves "
                "such pictures out"
            )
        return data

    def _words(self, text: Any) -> Iterator[str]:
        words = words_of(text, self._texts)
        if not is_blank(words):
            yield words


def _list(fields: Fields, path: str) -> list[Any]:
    value = parsed(look_up(fields, path), path)
    if value is None:
        raise BrokenSample(missing((path,), fields))
    if not isinstance(value, list):
        raise BrokenSample(f"broken page: {path!r} holds a {kind_of(value)}, not a list")
    return value
