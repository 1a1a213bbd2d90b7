"""A byte-level BPE trained on the texts of cards."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mm.cli import app
from mm.data.card import Card
from mm.sample import Sample, Text
from mm.tokenizers.bpe import END, BpeError, save_bpe, texts_of, train_bpe
from mm.tokenizers.text import TextTokenizer

DEMO = Path(__file__).parents[1] / "data_cards" / "demo"
WORDS = DEMO / "words.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bpe")
    run = CliRunner().invoke(app, ["data", "bpe", str(WORDS), "--out", str(out), "--size", "400"])
    assert run.exit_code == 0, run.output
    return out


def test_a_trained_tokenizer_loads_and_has_as_many_ids_as_were_asked_for(folder: Path) -> None:
    tokenizer = TextTokenizer.load(str(folder))
    assert tokenizer.vocabulary == 400
    assert tokenizer.end == 0
    assert tokenizer.begin == ()
    (piece,) = tokenizer.render(Sample("a card", "a key", (Text("red apple"),)))
    assert len(piece.ids) < len("red apple")
    assert piece.ids[-1] == tokenizer.end


@pytest.mark.parametrize("text", ["red apple", "Größe: 3 µm, 漢字 🦊\n\t\x00", "", f"words that say {END}"])
def test_nothing_is_unknown_and_every_text_reads_back(folder: Path, text: str) -> None:
    tokenizer = TextTokenizer.load(str(folder))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end not in ids


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    text = "a yellow banana to the left of a blue boat"
    assert theirs.encode(text) == TextTokenizer.load(str(folder)).encode(text)
    assert theirs.eos_token == END


def test_the_order_of_the_texts_does_not_matter() -> None:
    texts = list(texts_of(Card.load(WORDS), 20_000))
    assert train_bpe(texts, 350).to_str() == train_bpe(texts[::-1], 350).to_str()


def test_a_budget_of_characters_ends_a_card() -> None:
    texts = list(texts_of(Card.load(WORDS), 1_000))
    assert 1_000 <= sum(map(len, texts)) < 1_100
    assert sum(map(len, texts[:-1])) < 1_000


def test_texts_too_few_for_so_many_ids_are_an_error() -> None:
    with pytest.raises(BpeError, match="ids of 1000; take more text"):
        train_bpe(["a red apple"], 1000)
    with pytest.raises(BpeError, match="size 256, expected 257"):
        train_bpe(["a red apple"], 256)


def test_a_folder_is_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    save_bpe(train_bpe(texts_of(Card.load(WORDS), 4_000_000), 400), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
