"""Running text from dictionaries and from Python itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mm.data.card import Card
from mm.data.index import index_card
from mm.data.sources import build
from mm.data.sources.dictionaries import gcide_entries, plain_gcide, wordnet_entries
from mm.data.sources.python_docs import prose
from mm.sample import Text

MUSTILY = 'Mustily \\Mus"ti*ly\\, a.\n   In a musty state.\n   [1913 Webster]\n'
ABACK = """Aback \\A*back"\\ ([.a]*b[a^]k"), adv. [Pref. a- + back; AS. on
   b[ae]c at, on, or toward the back. See {Back}.]
   1. Toward the back or rear; backward. "Therewith aback she
      started." --Chaucer.
      [1913 Webster]

   2. (Naut.) Backward against the mast; as C[ae]sar's sails
      when pressed by the wind [R.].
      [1913 Webster]

   {To be taken aback}.
      (a) To be driven backward. -- {A*back"ly}, adv. [Obs. [Scot.]]
"""
LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
SIGH = '00004032 29 v 02 sigh 0 suspire 4 001 @ 00001740 v 0000 02 + 02 00 | heave or utter a sigh; "She sighed"  \n'
GALORE = '00013887 00 s 01 galore(ip) 0 001 & 00013662 a 0000 | existing in abundance; "whiskey galore"  \n'
HEAD = "05553288 08 n 0a head_word 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten words for one meaning  \n"


def base64(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64(number // 64) if number >= 64 else "") + digits[number % 64]


def dictd(*entries: tuple[list[str], str]) -> tuple[bytes, bytes]:
    """Index and dictionary of entries with their headwords."""
    lines, text = [], ""
    for headwords, entry in entries:
        lines += [f"{word}\t{base64(len(text))}\t{base64(len(entry))}\n" for word in headwords]
        text += entry
    return "".join(sorted(lines)).encode(), text.encode()


def test_an_entry_is_left_with_its_words_alone() -> None:
    assert plain_gcide(MUSTILY) == "Mustily, a. In a musty state."
    assert plain_gcide(ABACK).split("\n") == [
        'Aback, adv. 1. Toward the back or rear; backward. "Therewith aback she started." --Chaucer.',
        "2. (Naut.) Backward against the mast; as Caesar's sails when pressed by the wind.",
        "To be taken aback. (a) To be driven backward. -- Abackly, adv.",
    ]


def test_an_entry_that_many_headwords_share_is_one_document_and_what_is_about_the_dictionary_none() -> None:
    index, dictionary = dictd(
        (["00-database-info"], "This file was converted"),
        (["aback", "taken aback", "aback", "x" * 80], ABACK * 3),
        (["mustily"], MUSTILY),
    )
    found = list(gcide_entries(index, dictionary))
    assert [entry.headword for entry in found] == ["Aback", "Mustily"]
    assert found[1].text == "Mustily, a. In a musty state."


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (b"aback\tA\n", "line 1 of the index"),
        (b"aback\tA\t?\n", "expected headword"),
        (b"a\tA\tB\nb\tA\tz\n", "byte 51 of 9"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        list(gcide_entries(index, b"123456789"))


def test_a_meaning_is_its_words_its_gloss_and_its_examples() -> None:
    assert [entry.text for entry in wordnet_entries((LICENCE + SIGH).encode(), "verb")] == [
        'sigh, suspire (verb): heave or utter a sigh; "She sighed"'
    ]
    assert next(wordnet_entries(GALORE.encode(), "adj")).text.startswith("galore (adjective): existing in abundance")
    assert next(wordnet_entries(HEAD.encode(), "noun")).text == (
        "head word, b, c, d, e, f, g, h, i, j (noun): ten words for one meaning"
    )


def test_entries_of_one_headword_are_in_one_split_and_the_card_indexes(tmp_path: Path) -> None:
    source, out = tmp_path / "package", tmp_path / "out"
    folder = source / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = [
        ([f"word{n}"], f"Word{n} \\w\\, n.\n   Meaning {m} of word {n}, at length.\n")
        for n in range(60)
        for m in range(3)
    ]
    index, dictionary = dictd(*entries, (["short"], "Short\n"))
    (folder / "gcide.index").write_bytes(index)
    (folder / "gcide.dict.dz").write_bytes(gzip.compress(dictionary))
    report = build("gcide", out, source=source, validation=0.3, samples_per_shard=50)
    assert sum(report.samples.values()) == 180
    assert report.skipped == {"no meaning": 1}
    card = Card.load(out / "card.yaml")
    assert len(card.shards("train")) > 1
    words = {}
    for split in card.splits:
        rows = index_card(card, split, tmp_path / "index")
        assert rows.rows == report.samples[split]
        (part,) = rows.sample(0).parts
        assert isinstance(part, Text)
        assert part.text.startswith("Word")
        lines = [line for shard in card.shards(split) for line in Path(shard).read_text().splitlines()]
        words[split] = {json.loads(line)["headword"] for line in lines}
    assert not words["train"] & words["validation"]
    assert len(words["validation"]) > 8


@pytest.mark.parametrize(("name", "package"), [("gcide", "dict-gcide"), ("wordnet", "wordnet-base")])
def test_a_missing_dictionary_says_how_to_get_it(tmp_path: Path, name: str, package: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"apt-get download {package}"):
        build(name, tmp_path, source=tmp_path / "nothing")


def test_python_brings_half_a_million_characters_at_least(tmp_path: Path) -> None:
    report = build("python-docs", tmp_path)
    card = Card.load(tmp_path / "card.yaml")
    assert card.statistics["train"]["characters"] > 500_000
    assert report.samples["validation"] > 20
    texts = [json.loads(line)["text"] for line in (tmp_path / "train-0000.jsonl").read_text().splitlines()]
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if ">>>" in text]


def test_prose_is_what_is_neither_code_nor_a_heading() -> None:
    words = "The *first* argument\nof `this' is said to be a number, see ``that``."
    text = f"Heading\n=======\n\n{words}\n\n   >>> a = this(1)\n\nfoo(bar)"
    assert prose(text) == "The first argument of this is said to be a number, see that."
