"""Scenes: composed pictures whose captions are true, and splits that share nothing."""

from __future__ import annotations

import colorsys
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from mm.data.card import Card
from mm.data.index import index_card
from mm.data.shards import Record
from mm.data.sources import build
from mm.data.sources.scenes import DEMO, Stream, render, scene_sample
from mm.data.sources.scenes.compose import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    NEW,
    PLACES,
    SIZES,
    SPLITS,
    NoScene,
    Placed,
    Scene,
    draw_scene,
    new_combinations,
    split_of,
)
from mm.data.sources.scenes.language import NoCaption, caption, read
from mm.data.sources.scenes.pieces import PAINTS, Pieces, cut_out, paint, read_pieces
from mm.tokenizers.bpe import save_bpe, texts_of, train_bpe
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.small_world import write_recipe

TABLE = DEMO / "pieces.tsv"
STREAM = Stream(TABLE, seed=0, size=64)


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces.load(TABLE, DEMO / "card.yaml")


@pytest.fixture(scope="module")
def scenes(pieces: Pieces) -> dict[str, list[Scene]]:
    names = list(pieces.names)
    return {split: [draw_scene(0, split, n, names, pieces.visible) for n in range(1000)] for split in SPLITS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Card:
    out = tmp_path_factory.mktemp("scenes")
    build("scenes", out, samples=60, validation=20, heldout=20, samples_per_shard=25)
    return Card.load(out / "card.yaml")


def records(card: Card, split: str) -> list[Record]:
    return [one.record for shard in card.shards(split) for one in card.open(shard).scan() if one.record]


def facts(card: Card, split: str) -> list[dict[str, Any]]:
    return [json.loads(record.fields["json"]) for record in records(card, split)]


# ---------------------------------------------------------------------------------------------------------- captions


def test_every_caption_reads_back_as_its_scene(scenes: dict[str, list[Scene]], pieces: Pieces) -> None:
    for split, drawn in scenes.items():
        for number, scene in enumerate(drawn):
            assert read(caption(scene, pieces.plurals, split, number), pieces.plurals) == scene


def test_captions_say_what_a_reader_would_say() -> None:
    plurals = {"cat": "cats", "bus": "buses"}
    pair = Scene("blue", (Placed("cat", "left", "small"), Placed("bus", "right", "large", "red")))
    copies = Scene("pink", tuple(Placed("bus", place, "small", "green") for place in ("top", "bottom")))
    said = {caption(pair, plurals, number) for number in range(200)}
    assert "a small cat to the left of a large red bus on a blue background" in said
    assert "on a blue background, a large red bus to the right of a small cat" in said
    assert "a small cat on the left and a large red bus on the right; the background is blue" in said
    assert "two small green buses one above the other on a pink background" in {
        caption(copies, plurals, number) for number in range(200)
    }


@pytest.mark.parametrize(
    ("where", "cell"),
    [
        ("on the left", (0, 1)),
        ("in the right half", (2, 1)),
        ("in the upper half", (1, 0)),
        ("at the bottom", (1, 2)),
        ("in the lower half", (1, 2)),
        ("in the top right corner", (2, 0)),
        ("at the bottom left", (0, 2)),
        ("in the center", (1, 1)),
    ],
)
def test_words_for_places_mean_columns_and_rows(where: str, cell: tuple[int, int]) -> None:
    (one,) = read(f"a small cat {where} on a blue background", {"cat": "cats"}).pieces
    assert PLACES[one.place] == cell


def test_relations_put_the_first_where_they_say() -> None:
    def first(relation: str) -> str:
        scene = read(f"a small cat {relation} a large bus on a blue background", {"cat": "cats", "bus": "buses"})
        return next(one.place for one in scene.pieces if one.piece == "cat")

    relations = ("to the left of", "to the right of", "above", "below")
    assert [first(relation) for relation in relations] == ["left", "right", "top", "bottom"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("a small cat in the middle", "no sentence of a known form"),
        ("a small unicorn in the middle on a blue background", "no known thing"),
        ("a small cat on a blue background", "one thing at one place"),
        ("three small cats side by side on a blue background", "three things at 2 places"),
        ("two small cats at the seaside on a blue background", "no known thing"),
        ("a small cat to the left of a small cat on the right on a blue background", "one thing at one place"),
    ],
)
def test_words_that_are_not_a_caption_are_told_from_captions(words: str, complaint: str) -> None:
    with pytest.raises(NoCaption, match=complaint):
        read(words, {"cat": "cats"})


def test_names_of_pieces_cannot_be_mistaken_for_other_words(pieces: Pieces) -> None:
    said = {*COLOURS, *SIZES, *BACKGROUNDS, "and", "two", "three", "four"}
    for row in pieces.names.values():
        assert not said & set(row.name.split())
        assert not re.search(r"[,;]", row.name + row.plural)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_pieces_where_the_caption_says_and_background_elsewhere(pieces: Pieces, built: Card) -> None:
    for record in records(built, "train"):
        about = json.loads(record.fields["json"])
        scene = read(about["caption"], pieces.plurals)
        picture = np.asarray(PillowImage.open(io.BytesIO(record.fields["webp"])).convert("RGB"), dtype=np.int16)
        background = (picture == BACKGROUNDS[scene.background]).all(axis=2)
        for one, fact in zip(scene.pieces, about["pieces"], strict=True):
            assert fact | {"box": None} == {
                "name": one.piece,
                "place": one.place,
                "size": one.size,
                "colour": one.colour,
                "box": None,
            }
            left, top, right, bottom = fact["box"]
            assert max(right - left, bottom - top) == round(SIZES[one.size] * 64)
            x, y = ((cell + 1) * 16 for cell in PLACES[one.place])
            assert abs((left + right) / 2 - x) <= 0.5
            assert abs((top + bottom) / 2 - y) <= 0.5
            assert (~background[top:bottom, left:right]).mean() > 0.15
            background[top:bottom, left:right] = True
        assert background.all()


def test_a_painted_piece_has_the_hue_that_its_name_says(pieces: Pieces) -> None:
    for name in pieces.names:
        for colour, rgb in PAINTS.items():
            values = np.asarray(pieces.sprite(name, colour, 20))
            shown = np.median(values[values[..., 3] > 127][:, :3], axis=0)
            assert abs(hue(shown) - hue(rgb)) < 0.03, (name, colour, shown)


def hue(rgb: Iterable[float]) -> float:
    """From 0, red, through 1/3, green, to 1; that of a red that leans to blue is below 0."""
    turn = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0]
    return turn - (turn > 0.95)


def test_white_inside_a_drawing_stays_and_the_page_goes() -> None:
    page = PillowImage.new("RGB", (20, 20), "white")
    page.paste("black", (5, 5, 15, 15))
    page.paste("white", (8, 8, 12, 12))
    cut = np.asarray(cut_out(page))
    assert cut.shape == (10, 10, 4)
    assert (cut[..., 3] == 255).all()
    assert (cut[3:7, 3:7, :3] == 255).all()


def test_a_silhouette_takes_the_paint_itself() -> None:
    silhouette = PillowImage.new("RGBA", (8, 8), "black")
    assert (np.asarray(paint(silhouette, (250, 130, 25)))[..., :3] == (250, 130, 25)).all()


def test_every_piece_can_be_seen_before_most_backgrounds(pieces: Pieces) -> None:
    assert all(len(pieces.visible[name, None]) >= 4 for name in pieces.names)
    assert "white" not in pieces.visible["sheep", None]
    assert all(colour not in backgrounds for (_, colour), backgrounds in pieces.visible.items())


@pytest.mark.parametrize("places", [places for layouts in LAYOUTS for places in layouts])
@pytest.mark.parametrize("size", [32, 64, 97, 128])
def test_pieces_of_a_layout_do_not_overlap_at_any_size(places: tuple[str, ...], size: int, pieces: Pieces) -> None:
    square = {place: Placed("clipboard", place, "large") for place in places}
    covered = np.zeros((size, size), dtype=int)
    for one in square.values():
        shown = np.asarray(render(Scene("black", (one,)), size, pieces))
        covered += (shown != 0).any(axis=2)
    assert covered.max() == 1


# ------------------------------------------------------------------------------------------------------------ splits


def test_a_scene_is_in_the_one_split_that_may_hold_it(scenes: dict[str, list[Scene]], pieces: Pieces) -> None:
    other_seed = [draw_scene(1, "train", n, list(pieces.names), pieces.visible) for n in range(1000)]
    for split, drawn in (scenes | {"train": scenes["train"] + other_seed}).items():
        assert {split_of(scene) for scene in drawn} == {split}
    assert not set(scenes["train"]) & set(scenes["validation"])


def test_held_out_scenes_hold_a_pair_a_place_or_a_colour_that_training_never_shows(
    scenes: dict[str, list[Scene]],
) -> None:
    def combinations(scene: Scene) -> set[tuple[str, ...]]:
        names = sorted({one.piece for one in scene.pieces})
        pairs = {(a, b) for a in names for b in names if a < b}
        return pairs | {(one.piece, fact or "") for one in scene.pieces for fact in (one.place, one.colour)}

    known = set().union(*(combinations(scene) for scene in scenes["train"] + scenes["validation"]))
    kinds = Counter[str]()
    for scene in scenes["heldout"]:
        assert not combinations(scene) <= known
        kinds.update(
            "pair" if " with " in name else "place" if ": " in name else "colour" for name in new_combinations(scene)
        )
    assert min(kinds[kind] for kind in ("pair", "place", "colour")) > 100


def test_held_out_scenes_have_as_many_pieces_as_others(scenes: dict[str, list[Scene]]) -> None:
    means = {split: np.mean([len(scene.pieces) for scene in drawn]) for split, drawn in scenes.items()}
    assert max(means.values()) - min(means.values()) < 0.15
    assert 2.0 < means["train"] < 2.4


def test_a_tenth_of_all_combinations_is_new(pieces: Pieces) -> None:
    corners = [Scene("blue", (Placed(name, place, "small"),)) for name in pieces.names for place in PLACES]
    assert NEW - 0.03 < np.mean([bool(new_combinations(scene)) for scene in corners]) < NEW + 0.03


def test_every_fact_is_drawn_and_none_much_more_often(scenes: dict[str, list[Scene]]) -> None:
    drawn = [one for scene in scenes["train"] for one in scene.pieces]
    assert 0.25 < np.mean([one.colour is not None for one in drawn]) < 0.42
    assert 0.45 < np.mean([one.size == "large" for one in drawn]) < 0.55
    assert {scene.background for scene in scenes["train"]} == set(BACKGROUNDS)
    assert len({one.piece for one in drawn}) == 160


# ----------------------------------------------------------------------------------------------------------- builder


def test_a_scene_is_a_function_of_its_number_alone(tmp_path: Path, built: Card) -> None:
    build("scenes", tmp_path, samples=30, validation=0, heldout=0, samples_per_shard=7)
    shorter = Card.load(tmp_path / "card.yaml")
    assert list(shorter.splits) == ["train"]
    for first, second in zip(records(shorter, "train"), records(built, "train")[:30], strict=True):
        assert (first.key, first.fields) == (second.key, second.fields)
    assert scene_sample(STREAM, "train", 3).fields["webp"] == records(built, "train")[3].fields["webp"]
    assert scene_sample(STREAM._replace(seed=1), "train", 3).fields != scene_sample(STREAM, "train", 3).fields


def test_the_card_indexes_and_its_samples_are_a_picture_and_its_caption(tmp_path: Path, built: Card) -> None:
    assert built.statistics == {"train": {"samples": 60}, "validation": {"samples": 20}, "heldout": {"samples": 20}}
    for split, samples in (("train", 60), ("validation", 20), ("heldout", 20)):
        rows = index_card(built, split, tmp_path)
        assert rows.rows == samples
        sample = rows.sample(3)
        picture, words = sample.parts
        assert picture in sample.media
        assert words.text == facts(built, split)[3]["caption"]  # pyright: ignore


def test_every_scene_finds_a_place_in_a_plan_with_a_tokenizer_of_its_own_captions(built: Card, tmp_path: Path) -> None:
    save_bpe(train_bpe(texts_of(built, 1_000_000), 300), tmp_path / "bpe")
    names = {"scenes": built.path, "held_out": built.path, "text": tmp_path / "card.yaml"}
    written = write_recipe(tmp_path, names, tmp_path / "bpe", ["scenes"], steps=None, epochs=1)
    recipe = Recipe.load(written, ["model.decoder.config.vocabulary=300"])
    planned_here = planned(recipe).plan.statistics().sources["scenes"]
    assert planned_here.samples == 60
    assert not any(planned_here.dropped.values())


def test_a_shorter_build_leaves_no_shard_of_a_longer_one(tmp_path: Path) -> None:
    for samples in (9, 4):
        build("scenes", tmp_path, samples=samples, validation=0, heldout=0, samples_per_shard=3)
    assert [path.name for path in sorted(tmp_path.glob("*.tar*"))] == ["train-0000.tar", "train-0001.tar"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 16}, "size=16, expected 32"),
        ({"samples": -1}, "expected 0 or more"),
        ({"samples_per_shard": 0}, "shards of 1 or more"),
        ({"samples": "many"}, "expected int"),
        ({"sizes": 64}, "no option 'sizes'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build("scenes", tmp_path, **options)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("name\tplural\n", "the columns are"),
        ("file\tname\tplural\na.png\tcat\t\n", "line 2"),
        ("file\tname\tplural\na.png\tcat\tcats\nb.png\tcat\tkitties\n", "name 'cat' stands 2 times"),
    ],
)
def test_a_faulty_table_of_pieces_is_refused(tmp_path: Path, rows: str, complaint: str) -> None:
    table = tmp_path / "pieces.tsv"
    table.write_text(rows)
    with pytest.raises(ValueError, match=complaint):
        read_pieces(table)


def test_a_drawing_that_the_corpus_lacks_is_named(tmp_path: Path) -> None:
    table = tmp_path / "pieces.tsv"
    table.write_text("file\tname\tplural\nnowhere.png\tunicorn\tunicorns\n")
    with pytest.raises(FileNotFoundError, match="unicorn"):
        build("scenes", tmp_path, pieces=table, samples=1)


def test_too_few_pieces_are_an_error_and_not_an_endless_search(pieces: Pieces) -> None:
    four_pieces = next(
        n for n in range(100) if len(draw_scene(0, "train", n, list(pieces.names), pieces.visible).pieces) == 4
    )
    with pytest.raises(NoScene, match="from 1 pieces"):
        draw_scene(0, "heldout", four_pieces, ["cat"], {("cat", colour): [] for colour in (None, *COLOURS)})
