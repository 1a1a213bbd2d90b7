"""Running English from two dictionaries that Debian packages: one entry, or one meaning, a document.

    dict-gcide     GNU's Collaborative International Dictionary of English: long entries with quotations; GPL
    wordnet-base   WordNet: a meaning's words, its gloss and examples; a permissive licence

Both are built on the user's machine from the package (``apt-get download NAME``), as its ``.deb`` or unpacked. Entries
of one headword are all in one split.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mm.data.sources.debian import package_files
from mm.data.sources.staging import staged
from mm.data.sources.writer import BuildError, Report, Skips, rank, split_of, write_card, write_lines

GCIDE = PurePosixPath("usr/share/dictd")
WORDNET = PurePosixPath("usr/share/wordnet")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SHORTEST = 20
"""Characters of the shortest document; what is shorter is a headword without a meaning."""


class Entry(NamedTuple):
    """A document, and the word that decides its split."""

    headword: str
    text: str


def build_gcide(out: Path, source: Path, validation: float = 0.01, samples_per_shard: int = 20_000) -> Report:
    """Write the entries of GCIDE.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: the package dict-gcide, or a folder with ``gcide.index`` and ``gcide.dict.dz``.
        validation: share of the headwords whose entries are kept for validation.
        samples_per_shard: where shards are cut.

    Raises:
        FileNotFoundError: the package is not there, or lacks the dictionary; says how to get it.
        BuildError: an index that does not fit its dictionary.
    """
    files = _files("dict-gcide", source, GCIDE, ("gcide.index", "gcide.dict.dz"))
    entries = gcide_entries(files["gcide.index"], _unpacked(files["gcide.dict.dz"]))
    about = {
        "name": "gcide",
        "licence": "GPL-2.0-or-later (GNU Collaborative International Dictionary of English)",
        "origin": "Debian package dict-gcide, by `mm data build gcide`",
        "description": "Entries of a dictionary of 1913 and later additions, without pronunciation and etymology.",
    }
    return write_entries(out, entries, about, validation, samples_per_shard, Skips())


def build_wordnet(out: Path, source: Path, validation: float = 0.01, samples_per_shard: int = 20_000) -> Report:
    """Write the meanings of WordNet.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: the package wordnet-base, or a folder with ``data.noun`` and the like.
        validation: share of the headwords whose meanings are kept for validation.
        samples_per_shard: where shards are cut.

    Raises:
        FileNotFoundError: the package is not there, or lacks the database; says how to get it.
    """
    files = _files("wordnet-base", source, WORDNET, [f"data.{part}" for part in PARTS_OF_SPEECH])
    entries = (entry for part in PARTS_OF_SPEECH for entry in wordnet_entries(files[f"data.{part}"], part))
    about = {
        "name": "wordnet",
        "licence": "WordNet 3.0 licence (use, copying and changes permitted; copyright 2006 Princeton University)",
        "origin": "Debian package wordnet-base, by `mm data build wordnet`",
        "description": "The meanings of words with their synonyms and examples.",
    }
    return write_entries(out, entries, about, validation, samples_per_shard, Skips())


def _files(package: str, source: Path, folder: PurePosixPath, wanted: Iterable[str]) -> dict[str, bytes]:
    try:
        return dict(package_files(source, folder, set(wanted)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. How to get it: `apt-get download {package}`, then source=….deb") from error


def _unpacked(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BuildError(f"gcide.dict.dz is damaged: {error}; download the package again") from error


def write_entries(
    out: Path,
    entries: Iterable[Entry],
    about: Mapping[str, str],
    validation: float,
    samples_per_shard: int,
    skips: Skips,
) -> Report:
    """Write entries, each split in an order that a hash decides, so that no shard is all about words of one letter.

    Args:
        about: name, licence, origin and description, for the card.
        skips: counts what is left out; entries may count there, too.
    """
    splits: dict[str, list[Entry]] = {"train": [], "validation": []}
    for entry in entries:
        if len(entry.text) < SHORTEST:
            skips.add("no meaning", entry.headword)
        elif not entry.text.isascii() and re.search("[\ud800-\udfff]", entry.text):
            skips.add("text is not UTF-8", ascii(entry.headword))
        else:
            splits[split_of(entry.headword.lower(), validation)].append(entry)
    with staged(out, list(splits), extension="jsonl") as stage:
        samples = {}
        for split, members in splits.items():
            members.sort(key=lambda entry: rank("order", entry.text))
            samples[split] = write_lines((entry._asdict() for entry in members), stage, split, samples_per_shard)
        filled = [split for split in splits if samples[split]]
        if not filled:
            raise BuildError(f"{about['origin']}: no entry could be used; left out: {skips}")
        statistics = {
            split: {"samples": samples[split], "characters": sum(len(entry.text) for entry in splits[split])}
            for split in filled
        }
        card = {
            **about,
            "format": "jsonl",
            "splits": {split: {"shards": [f"{split}-*.jsonl"]} for split in filled},
            "sample": [{"text": "text"}],
            "statistics": statistics,
        }
        write_card(stage / "card.yaml", card)
    return Report(samples, skips)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


# -------------------------------------------------------------------------------------------------------------- GCIDE

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PRONUNCIATION = re.compile(r"\s*\\[^\\]*\\(\s*\([^()]*\))?")
_LETTER = re.compile(r"\[[=.^~*,'\"`-]*([A-Za-z]{1,2})(?:\^|mac|um)?\]")
_NOTE = re.compile(r"\s*\[[^\[\]]*\]")
_LINK = re.compile(r"\{([^{}]*)\}")


def gcide_entries(index: bytes, dictionary: bytes) -> Iterator[Entry]:
    """The entries of a dictd dictionary in GCIDE's markup, in the order of their places.

    Args:
        index: lines of headword, offset and length, the numbers in dictd's base 64; many headwords share an entry.
        dictionary: the entries, unpacked.

    Raises:
        BuildError: a line that is none, or a place outside of the dictionary.
    """
    places = set()
    for number, line in enumerate(_decoded(index, "the index").removesuffix("\n").split("\n"), start=1):
        headword, *place = line.split("\t")
        if len(place) != 2 or not set("".join(place)) <= set(_DIGITS):
            raise BuildError(f"line {number} of the index is {line!r}, expected headword, offset and length")
        offset, length = map(_number, place)
        if offset + length > len(dictionary):
            raise BuildError(f"line {number} of the index ends at byte {offset + length} of {len(dictionary)}")
        if not headword.startswith("00-"):  # about the dictionary
            places.add((offset, length))
    for offset, length in sorted(places):
        entry = dictionary[offset : offset + length].decode("cp1252", errors="replace")
        yield Entry(re.split(r"[\\\n,]", entry)[0].strip(), plain_gcide(entry))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def plain_gcide(entry: str) -> str:
    """An entry as running text, a paragraph a line.

    Pronunciation goes, and so does all that stands in brackets: etymology, sources, remarks on usage. Letters that
    are spelled out keep their base: ``[ae]`` is ae, ``[e^]`` is e. ``{Links}`` become their words.
    """
    text = _LETTER.sub(r"\1", _PRONUNCIATION.sub("", entry, count=1))
    without = _NOTE.sub("", text)
    while without != text:  # brackets within brackets
        text, without = without, _NOTE.sub("", without)
    text = _LINK.sub(lambda link: re.sub(r'[*"`]', "", link[1]), text)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip(" ") for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(re.sub(r" ([,;.])(?= |$)", r"\1", paragraph) for paragraph in paragraphs if paragraph)


# ------------------------------------------------------------------------------------------------------------ WordNet


def wordnet_entries(data: bytes, part: str) -> Iterator[Entry]:
    """The meanings in a file of WordNet's database (wndb(5WN)): ``sigh, suspire (verb): heave or utter a sigh; …``.

    Args:
        data: the content of ``data.{part}``; a line a meaning, after a licence whose lines begin with a space.
        part: a key of `PARTS_OF_SPEECH`.
    """
    for line in _decoded(data, f"data.{part}").removesuffix("\n").split("\n"):
        if line.startswith(" "):
            continue
        facts, _, gloss = line.partition(" | ")
        _, _, _, count, *words = facts.split(" ")
        said = [_plain_word(word) for word in words[: 2 * int(count, 16) : 2]]
        yield Entry(said[0], f"{', '.join(said)} ({PARTS_OF_SPEECH[part]}): {gloss.strip()}")


def _plain_word(word: str) -> str:
    """``galore(ip)`` says where an adjective may stand; spaces are written as ``_``."""
    return re.sub(r"\(\w+\)$", "", word).replace("_", " ")
