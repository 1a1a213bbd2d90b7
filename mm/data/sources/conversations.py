"""Chats about captioned pictures: descriptions, lettered choices, categories, yes or no, several turns, two pictures.

They have LLaVA's form, ``{"conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}]}``. Whoever
reads only the words of a question must not be able to answer it, so pictures are dealt into blocks of four, and the
four captions of a block are the options of the questions about each of its pictures: every caption is right once and
wrong three times, every letter is right once, every caption is asked for once with the answer yes and once with no.

All chats about a picture stand next to each other, so that compression stores the picture once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mm.data.sources.writer import Member, rank

LETTERS = "ABCD"
MARKER = "<image>\n"
DESCRIBE = "What does the picture show?"
CATEGORISE = "Which category does it belong to?"

Turn = tuple[str, str]
"""A question and its answer."""


class Captioned(Protocol):
    """A picture with what questions need to know of it. Two captions with one head may both be true of a picture."""

    @property
    def key(self) -> str: ...
    @property
    def webp(self) -> bytes: ...
    @property
    def caption(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def category(self) -> str: ...


def conversations(pictures: Sequence[Captioned], seed: int) -> Iterator[Member]:
    """Up to nine chats per picture, in the order of the pictures; a function of the seed and the pictures' keys alone.

    Pictures that find no block, because their category has too few heads, get fewer chats.
    """
    chats: dict[str, list[Member]] = {
        picture.key: [chat(f"{picture.key}-describe", [picture], [(DESCRIBE, picture.caption)])] for picture in pictures
    }
    for block in deal(pictures, lambda picture: picture.category, (seed, "easy")):
        for place, picture in enumerate(block):
            chats[picture.key] += _across_categories(picture, block, place)
    by_category: dict[str, list[Captioned]] = defaultdict(list)
    for picture in pictures:
        by_category[picture.category].append(picture)
    for category, members in by_category.items():
        for block in deal(members, lambda picture: picture.head, (seed, "hard", category)):
            for place, picture in enumerate(block):
                chats[picture.key] += _within_category(picture, block, place)
    for picture in pictures:
        yield from chats[picture.key]


def deal(
    pictures: Sequence[Captioned], kind: Callable[[Captioned], str], keys: tuple[int | str, ...]
) -> Iterator[list[Captioned]]:
    """Blocks of four pictures of four kinds, in random order; takes from the largest kinds to leave out fewest."""
    left: dict[str, list[Captioned]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: rank(*keys, picture.key)):
        left[kind(picture)].append(picture)
    for number in range(len(pictures) // len(LETTERS)):
        largest = sorted(left, key=lambda name: (-len(left[name]), rank(*keys, number, name)))[: len(LETTERS)]
        if len(largest) < len(LETTERS):
            return
        block = [left[name].pop() for name in largest]
        left = {name: members for name, members in left.items() if members}
        yield sorted(block, key=lambda picture: rank(*keys, "place", picture.key))


def _across_categories(picture: Captioned, block: Sequence[Captioned], place: int) -> Iterator[Member]:
    """Chats whose wrong answers are of other categories: a choice, the category, and one about two pictures."""
    captions = [other.caption for other in block]
    # Categories stand in another order than captions, so that the letter of one question does not give the other's.
    turned = [block[(number + 1) % len(block)].category for number in range(len(block))]
    category = (lettered(CATEGORISE, turned), LETTERS[turned.index(picture.category)])
    yield chat(f"{picture.key}-easy", [picture], [(lettered(DESCRIBE, captions), LETTERS[place])])
    yield chat(f"{picture.key}-category", [picture], [category])
    yield chat(f"{picture.key}-turns", [picture], [(DESCRIBE, picture.caption), category])
    neighbour = block[place - 1]
    asked, rest, answer = (picture, neighbour, "first") if place % 2 else (neighbour, picture, "second")
    turns = [
        (f"Which picture shows this: {asked.caption}? Answer first or second.", answer),
        ("What does the other picture show?", rest.caption),
    ]
    yield chat(f"{picture.key}-pair", [picture, neighbour], turns)


def _within_category(picture: Captioned, block: Sequence[Captioned], place: int) -> Iterator[Member]:
    """Chats whose wrong answers are of the same category but of another head: a choice, a yes and a no."""
    captions = [other.caption for other in block]
    yield chat(f"{picture.key}-hard", [picture], [(lettered(DESCRIBE, captions), LETTERS[place])])
    yield chat(f"{picture.key}-yes", [picture], [(_whether(picture.caption), "yes")])
    yield chat(f"{picture.key}-no", [picture], [(_whether(captions[place - 1]), "no")])


def _whether(caption: str) -> str:
    return f"Does the picture show this: {caption}? Answer yes or no."


def lettered(question: str, options: Sequence[str]) -> str:
    """A multiple-choice prompt in VLMEvalKit's form, which the letter alone answers."""
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=True))
    return f"Question: {question}\nOptions:\n{lines}Please select the correct answer from the options above. \n"


def chat(key: str, pictures: Sequence[Captioned], turns: Sequence[Turn]) -> Member:
    """A chat record; the first question begins with one marker for each picture, in order."""
    (first, answer), *rest = turns
    spoken = [(MARKER * len(pictures) + first, answer), *rest]
    messages = [
        {"from": speaker, "value": words}
        for turn in spoken
        for speaker, words in zip(("human", "gpt"), turn, strict=True)
    ]
    names = ["webp"] if len(pictures) == 1 else [f"{number}.webp" for number in range(len(pictures))]
    files = {name: picture.webp for name, picture in zip(names, pictures, strict=True)}
    return Member(key, files | {"json": {"conversations": messages}})
