"""Multiple-choice suites in MMBench's TSV form, which VLMEvalKit reads as they are.

    demo.tsv          index  image  question  A  B  …  answer  hint  category  l2-category  split  (more columns)
    demo.suite.yaml   what is fixed before any model is scored: score rule, prompt, seed, how the suite was made

`image` is base64, or, up to 64 characters long, the index of the row that holds the picture.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from mm.configure import load, to_yaml

Rule = Literal["sum", "per_token", "minus_text_only"]
RULES: tuple[Rule, ...] = get_args(Rule)
LETTERS = string.ascii_uppercase
REFERENCE_LENGTH = 64
"""An `image` of up to this many characters is the index of another row."""
ROTATION_OFFSET = 1_000_000
"""Rotation k of a question has index + k · 10⁶ (CircularEval)."""
READ_AS_MISSING = re.compile(r"#?N/?A|n/a|#N/A N/A|<NA>|NULL|null|None|-?NaN|-?nan|-?1\.#IND|-?1\.#QNAN")
"""Texts that pandas, hence VLMEvalKit, takes for an empty cell: such an option would vanish there."""
LARGEST_FIELD = 2**31 - 1


class SuiteError(ValueError):
    """A suite that cannot be used as it is; the message names file, row and column."""


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question.

    index: number in the suite; rotations of it add multiples of 10⁶
    picture: id of its picture in `Suite.pictures`
    answer: position of the right option
    difficulty: ``easy``, ``hard`` or empty
    extra: further columns, kept for a round trip
    """

    index: int
    picture: str
    text: str
    options: tuple[str, ...]
    answer: int
    hint: str = ""
    category: str = ""
    l2_category: str = ""
    split: str = ""
    difficulty: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]

    @property
    def letter_prompt(self) -> str:
        """The prompt that VLMEvalKit builds for multiple choice, to be answered with a letter."""
        hint = f"Hint: {self.hint}\n" if self.hint else ""
        options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, self.options, strict=False))
        request = "Please select the correct answer from the options above. \n"
        return f"{hint}Question: {self.text}\nOptions:\n{options}{request}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is decided before any model is scored.

    score: rule that turns the likelihoods of the options into scores, see `mm.evaluate.choice`
    prompt: text between picture and option when options are scored; ``{question}`` and ``{hint}`` are filled in
    seed: of subsets, shuffled pictures and the bootstrap
    made: how the suite came about, for the reader
    """

    score: Rule = "sum"
    prompt: str = "{question}"
    seed: int = 0
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Questions and their pictures (id → encoded file).

    Raises:
        SuiteError: there is no question with an index below 10⁶, an index occurs twice, a picture is missing, or two
            ids hold the same file, which would then count as two independent pictures in the intervals and stand in
            for itself among shuffled pictures.
    """

    name: str
    questions: tuple[Question, ...]
    pictures: Mapping[str, bytes]
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if not self.first_rotations:
            raise SuiteError(f"{self.name}: no question with an index below {ROTATION_OFFSET}")
        seen: set[int] = set()
        for question in self.questions:
            if question.index in seen:
                raise SuiteError(f"{self.name}: index {question.index} occurs twice")
            if question.picture not in self.pictures:
                raise SuiteError(f"{self.name}: question {question.index} names unknown picture {question.picture!r}")
            seen.add(question.index)
        ids: dict[bytes, str] = {}
        for picture, data in self.pictures.items():
            if (other := ids.setdefault(data, picture)) != picture:
                raise SuiteError(f"{self.name}: pictures {other!r} and {picture!r} are the same file; give them one id")

    @cached_property
    def first_rotations(self) -> tuple[Question, ...]:
        """The questions without their rotations, if the suite holds rotations at all."""
        return tuple(question for question in self.questions if question.index < ROTATION_OFFSET)

    @cached_property
    def groups(self) -> dict[int, tuple[Question, ...]]:
        """The rotations of each question that the suite holds, by the index of the first."""
        groups: dict[int, tuple[Question, ...]] = {}
        for question in sorted(self.questions, key=lambda question: question.index):
            first = question.index % ROTATION_OFFSET
            groups[first] = (*groups.get(first, ()), question)
        return groups

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of questions and pictures, recorded with every result; the settings are recorded in full."""
        digest = hashlib.sha256(json.dumps([asdict(question) for question in self.questions]).encode())
        for picture in sorted(self.pictures):
            digest.update(picture.encode())
            digest.update(hashlib.sha256(self.pictures[picture]).digest())
        return digest.hexdigest()


# Reading


def read_suite(path: str | Path) -> Suite:
    """The suite in a TSV file, with the settings of the ``.suite.yaml`` beside it, if there is one.

    A column `picture` names the pictures; without it they are named by the first row that shows them.

    Raises:
        SuiteError: names file, row (the first after the header is 1) and column of what is wrong.
    """
    path = Path(path)
    table = list(_rows(path))
    images = _pictures_by_index(table)
    pictures: dict[str, bytes] = {}
    names: dict[bytes, str] = {}
    questions = []
    for row in table:
        image = images[row.index]
        picture = row.get("picture") or names.get(image) or str(row.index)
        if pictures.setdefault(picture, image) != image:
            raise row.error("picture", f"{picture!r} is the id of another picture already")
        names.setdefault(image, picture)
        questions.append(_question(row, picture))
    return Suite(path.stem, tuple(questions), pictures, read_settings(settings_path(path)))


@dataclass(frozen=True, slots=True)
class _Row:
    path: Path
    number: int
    cells: Mapping[str, str]

    def error(self, column: str, problem: str) -> SuiteError:
        return SuiteError(f"{self.path}, row {self.number}, column {column}: {problem}")

    def get(self, column: str) -> str:
        return self.cells.get(column, "")

    @property
    def index(self) -> int:
        text = self.get("index")
        if not (text.isascii() and text.isdigit()):
            raise self.error("index", f"{text!r} is not a whole number")
        return int(text)


@contextmanager
def _wide_fields() -> Iterator[None]:
    """The csv module refuses fields of more than 128 KiB, and a picture is one field."""
    limit = csv.field_size_limit(LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _rows(path: Path) -> Iterator[_Row]:
    with _wide_fields(), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            if missing := [name for name in ("index", "image", "question", "A", "B", "answer") if name not in header]:
                raise SuiteError(f"{path}: no column {', '.join(missing)}; the header reads {', '.join(header)}")
            for number, cells in enumerate(reader, 1):
                if len(cells) != len(header):
                    raise SuiteError(f"{path}, row {number}: {len(cells)} columns, but the header has {len(header)}")
                yield _Row(path, number, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise SuiteError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise SuiteError(f"{path}, after line {reader.line_num}: not UTF-8 ({error.reason})") from error


def _pictures_by_index(table: Sequence[_Row]) -> dict[int, bytes]:
    """Decoded picture of every row; rows may refer to earlier and to later rows."""
    held: dict[str, bytes] = {}
    for row in table:
        image = row.get("image")
        if len(image) > REFERENCE_LENGTH:
            try:
                held[str(row.index)] = base64.b64decode(image, validate=True)
            except ValueError as error:
                raise row.error("image", f"not the base64 of one picture ({error})") from error
    pictures = {}
    for row in table:
        image = row.get("image")
        holder = str(row.index) if len(image) > REFERENCE_LENGTH else image
        if holder not in held:
            raise row.error("image", f"{image!r} is neither base64 nor the index of a row that holds a picture")
        pictures[row.index] = held[holder]
    return pictures


KNOWN_COLUMNS = ("index", "image", "question", "answer", "hint", "category", "l2-category", "split")


def _question(row: _Row, picture: str) -> Question:
    options = [row.get(letter) for letter in LETTERS]
    count = next((position for position, option in enumerate(options) if not option), len(LETTERS))
    if count < 2:
        raise row.error(LETTERS[count], "empty, but a question needs two options or more")
    if gap := next((position for position in range(count, len(LETTERS)) if options[position]), None):
        raise row.error(LETTERS[count], f"empty, but column {LETTERS[gap]} is not")
    answer = row.get("answer")
    if answer not in tuple(LETTERS[:count]):
        raise row.error("answer", f"{answer!r} is none of the options {', '.join(LETTERS[:count])}")
    return Question(
        index=row.index,
        picture=picture,
        text=row.get("question"),
        options=tuple(options[:count]),
        answer=LETTERS.index(answer),
        hint=row.get("hint"),
        category=row.get("category"),
        l2_category=row.get("l2-category"),
        split=row.get("split"),
        difficulty=row.get("difficulty"),
        extra={
            name: cell
            for name, cell in row.cells.items()
            if name not in (*KNOWN_COLUMNS, *LETTERS, "picture", "difficulty")
        },
    )


def settings_path(path: str | Path) -> Path:
    """``demo.suite.yaml`` for ``demo.tsv``."""
    return Path(path).with_suffix(".suite.yaml")


def read_settings(path: Path) -> Settings:
    """Settings in a YAML file; those of `Settings` where there is no file.

    Raises:
        RecipeError: an unknown key or a value of the wrong type; names key, file and line.
    """
    return load(Settings, path.resolve()) if path.exists() else Settings()


# Writing


def write_suite(suite: Suite, path: str | Path) -> None:
    """Writes TSV and settings. A picture is stored once, in the first row that shows it.

    Raises:
        SuiteError: a text that VLMEvalKit would read as missing, or a picture too small to be told from an index.
    """
    path = Path(path)
    questions = suite.questions
    options = LETTERS[: max(len(question.options) for question in questions)]
    extra = tuple(dict.fromkeys(name for question in questions for name in question.extra))
    header = ("index", "picture", "question", *options, "answer", "hint", "category", "l2-category", "split")
    header = (*header, "difficulty", *extra, "image")
    holders: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for question in questions:
            cells = _cells(question)
            if missing := [column for column, text in cells.items() if READ_AS_MISSING.fullmatch(text)]:
                raise SuiteError(
                    f"{suite.name}, question {question.index}, column {missing[0]}: VLMEvalKit reads "
                    f"{cells[missing[0]]!r} as an empty cell; write it differently"
                )
            holder = holders.setdefault(question.picture, question.index)
            image = (
                str(holder) if holder != question.index else base64.b64encode(suite.pictures[question.picture]).decode()
            )
            if holder == question.index and len(image) <= REFERENCE_LENGTH:
                raise SuiteError(f"{suite.name}: picture {question.picture!r} has too few bytes to be a picture")
            writer.writerow({**cells, "image": image})
    settings_path(path).write_text(to_yaml(suite.settings), encoding="utf-8")


def _cells(question: Question) -> dict[str, str]:
    return {
        "index": str(question.index),
        "picture": question.picture,
        "question": question.text,
        **dict(zip(LETTERS, question.options, strict=False)),
        "answer": question.letter,
        "hint": question.hint,
        "category": question.category,
        "l2-category": question.l2_category,
        "split": question.split,
        "difficulty": question.difficulty,
        **question.extra,
    }
