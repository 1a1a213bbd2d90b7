"""A choice suite from captioned pictures, on which words alone give exactly chance.

Pictures are drawn into *blocks* of four. The four captions of a block are the options of four questions, one for each
of its pictures, so every caption is the answer once and a distractor three times, always against the same three others.
Whatever looks only at the options (a language model's taste for a caption, its length, its words) picks the same option
in all four questions of a block and is right in exactly one. Inside a block the right letters are A, B, C and D.

    easy: four categories      hard: one category, four heads      never: two equal captions or heads in one block
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mm.evaluate.suite import Question, Rule, Settings, Suite
from mm.packing.hashing import shuffled

BLOCK = 4
ATTEMPTS = 8
"""Orders tried a round; the one that leaves out fewest pictures is kept."""
QUESTION = "What does the picture show?"


@dataclass(frozen=True, slots=True)
class CaptionedPicture:
    """A picture that questions can be made of.

    caption: what is true of this picture and, as far as known, of no picture with another head
    head: what the caption is about, in a word; two captions with one head may both be true of a picture
    """

    id: str
    image: bytes
    caption: str
    category: str
    head: str


Block = tuple[CaptionedPicture, ...]


def build_choice_suite(
    records: Sequence[CaptionedPicture],
    easy_per_picture: int,
    hard_per_picture: int,
    seed: int,
    name: str = "demo",
    score: Rule = "minus_text_only",
    prompt: str = "",
) -> Suite:
    """A suite of four-option questions with up to so many easy and hard ones a picture.

    Every round deals the pictures anew; those that find no block are left out of the round. How many, and which
    categories have fewer than four heads and so no hard questions, stands in ``settings.made``. `prompt` is empty by
    default: a caption follows its picture as in training.

    Raises:
        ValueError: an id occurs twice, or fewer than four categories although easy questions are wanted.
    """
    records = list(records)
    repeated = [id for id, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise ValueError(f"picture id {repeated[0]!r} occurs more than once")
    categories = sorted({record.category for record in records})
    if easy_per_picture and len(categories) < BLOCK:
        raise ValueError(f"easy questions need {BLOCK} categories, found {len(categories)}: {', '.join(categories)}")
    members = {category: [record for record in records if record.category == category] for category in categories}
    heads = {category: len({_folded(record.head) for record in members[category]}) for category in categories}
    easy = _rounds(records, lambda record: record.category, easy_per_picture, (seed, "easy"))
    hard = [
        block
        for category in categories
        for block in _rounds(
            members[category], lambda record: _folded(record.head), hard_per_picture, (seed, "hard", category)
        )
    ]
    numbers = {record.id: number for number, record in enumerate(records)}
    asked = [("easy", *each) for block in easy for each in _questions(block, seed)]
    asked += [("hard", *each) for block in hard for each in _questions(block, seed)]
    asked.sort(key=lambda each: (numbers[each[1].id], each[0]))
    questions = tuple(
        Question(
            index=index,
            picture=record.id,
            text=QUESTION,
            options=options,
            answer=answer,
            category=record.category,
            l2_category=difficulty,
            split="test",
            difficulty=difficulty,
        )
        for index, (difficulty, record, options, answer) in enumerate(asked)
    )
    with_easy, with_hard = ({record.id for block in blocks for record in block} for blocks in (easy, hard))
    made = {
        "method": "blocks of four captions, each the answer once",
        "records": len(records),
        "easy_per_picture": easy_per_picture,
        "hard_per_picture": hard_per_picture,
        "pictures_without_easy": len(records) - len(with_easy),
        "pictures_without_hard": len(records) - len(with_hard),
        "categories_too_small_for_hard": {name: count for name, count in heads.items() if count < BLOCK},
    }
    pictures = {record.id: record.image for record in records if record.id in with_easy | with_hard}
    return Suite(name, questions, pictures, Settings(score=score, prompt=prompt, seed=seed, made=made))


def _rounds(
    records: Sequence[CaptionedPicture],
    kind: Callable[[CaptionedPicture], str],
    rounds: int,
    keys: tuple[int | str, ...],
) -> list[Block]:
    """Blocks of `rounds` rounds; in each a picture is in one block at most, and no picture gets a question twice."""
    blocks: list[Block] = []
    asked: set[tuple[str, frozenset[str]]] = set()
    for number in range(rounds):
        attempts = (_deal(records, kind, asked, (*keys, number, attempt)) for attempt in range(ATTEMPTS))
        dealt = max(attempts, key=len)
        blocks += dealt
        asked |= {question for block in dealt for question in _identities(block)}
    return blocks


def _deal(
    records: Sequence[CaptionedPicture],
    kind: Callable[[CaptionedPicture], str],
    asked: set[tuple[str, frozenset[str]]],
    keys: tuple[int | str, ...],
) -> list[Block]:
    """Disjoint blocks with four kinds each, drawn from the kinds with most pictures left.

    Taking the largest kinds first leaves out fewest: a kind with more than a quarter of the pictures is what limits.
    """
    left: dict[str, list[CaptionedPicture]] = {}
    for record in (records[number] for number in shuffled(len(records), *keys)):
        left.setdefault(kind(record), []).append(record)
    blocks: list[Block] = []
    while True:
        block: Block = ()
        kinds = list(left)
        order = [kinds[number] for number in shuffled(len(kinds), *keys, "kinds", len(blocks))]
        for candidates in sorted((left[name] for name in order), key=len, reverse=True):
            fitting = (record for record in candidates if _fits(block, record, asked))
            if (record := next(fitting, None)) is not None:
                block = (*block, record)
            if len(block) == BLOCK:
                break
        else:
            return blocks
        for record in block:
            left[kind(record)].remove(record)
        blocks.append(block)


def _fits(block: Block, record: CaptionedPicture, asked: set[tuple[str, frozenset[str]]]) -> bool:
    """Whether the record differs from the block in caption and head, and completes no questions asked before."""
    for other in block:
        if _folded(other.caption) == _folded(record.caption) or _folded(other.head) == _folded(record.head):
            return False
    return len(block) + 1 < BLOCK or asked.isdisjoint(_identities((*block, record)))


def _identities(block: Block) -> list[tuple[str, frozenset[str]]]:
    captions = frozenset(record.caption for record in block)
    return [(record.id, captions) for record in block]


def _questions(block: Block, seed: int) -> list[tuple[CaptionedPicture, tuple[str, ...], int]]:
    """(picture, options, position of the answer) for every picture of the block; each position once."""
    label = "/".join(record.id for record in block)
    questions = []
    for answer, number in enumerate(shuffled(BLOCK, seed, "letters", label)):
        record = block[number]
        order = shuffled(BLOCK, seed, "options", label, record.id)
        distractors = [block[other].caption for other in order if other != number]
        options = (*distractors[:answer], record.caption, *distractors[answer:])
        questions.append((record, options, answer))
    return questions


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def distractor_counts(questions: Sequence[Question]) -> dict[str, tuple[int, int]]:
    """How often each option text is the answer, and how often a distractor."""
    answers = Counter(question.options[question.answer] for question in questions)
    shown = Counter(option for question in questions for option in question.options)
    return {option: (answers[option], shown[option] - answers[option]) for option in shown}
