"""Interleaved pages: OBELICS' lists side by side, MMC4's sentences with their pictures, and what breaks them."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from torch import Tensor

from mm.data.card import Card, CardError
from mm.data.index import Index, IndexingError, index_card
from mm.data.mapping import PADDING, parse_mapping
from mm.data.mapping.words import is_blank
from mm.data.sources import build
from mm.packing.collate import Processor
from mm.packing.materialise import MicroStep
from mm.sample import BrokenSample, Image, Modality, Sample, Text
from mm.train.dataset import PlannedData, open_data
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests.shard_files import RangeServer, as_json, jpeg, write_card, write_tar
from tests.small_world import picture, write_recipe

SIDE_BY_SIDE = {"texts": "texts", "images": "images"}
IN_TARS = {"texts": "json.texts", "images": "json.images"}
MMC4 = {"texts": "json.text_list", "images": "json.image_info", "at": "matched_text_index", "file": "image_name"}


def indexed(card: Path) -> Index:
    return index_card(Card.load(card), "train", card.parent / "index", progress=False)


def seen(sample: Sample) -> list[str | int]:
    """The parts in order: words, and the widths of pictures."""
    return [
        part.text if isinstance(part, Text) else PillowImage.open(io.BytesIO(part.data)).width for part in sample.parts
    ]


def wide(width: int) -> bytes:
    return jpeg(width, 8)


def parquet_page(folder: Path, texts: list[Any], images: pa.Array, **options: Any) -> Index:
    table = pa.table({"texts": [texts], "images": images, "ignored": [b"x" * 1000]})
    pq.write_table(table, folder / "0.parquet")
    return indexed(write_card(folder, "0.parquet", SIDE_BY_SIDE | options, format="parquet"))


def tar_page(folder: Path, sample: dict[str, Any], record: Any, files: dict[str, bytes]) -> Index:
    """The index of a page with its files, and of a good one before it."""
    good = {"texts": ["good"], "images": [None], "text_list": ["good"], "image_info": []}
    page = [("1.json", as_json(record)), *((f"1.{name}", data) for name, data in files.items())]
    write_tar(folder / "0.tar", [("0.json", as_json(good)), *page])
    return indexed(write_card(folder, "0.tar", sample))


def reasons(index: Index) -> list[str]:
    return index.errors.column("reason").to_pylist()


# -------------------------------------------------------------------------------------------------------- side by side

FILES = [None, wide(11), wide(12), None, wide(13)]


@pytest.mark.parametrize(
    "images",
    [
        pa.array([FILES], pa.list_(pa.binary())),
        pa.array([FILES], pa.large_list(pa.large_binary())),
        pa.array(
            [[file and {"bytes": file, "path": "a.jpg"} for file in FILES]],
            pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ),
    ],
    ids=["binary", "large", "struct"],
)
def test_a_parquet_page_gives_its_texts_and_pictures_in_their_order(tmp_path: Path, images: pa.Array) -> None:
    index = parquet_page(tmp_path, ["First.", None, None, " Then. ", None], images)
    assert seen(index.sample(0)) == ["First.", 11, 12, " Then. ", 13]
    assert [fact[0] for fact in index.facts(0)] == [11, 12, 13]
    assert all(part.loss and part.role is None for part in index.sample(0).parts if isinstance(part, Text))
    assert index.characters.tolist() == [[len("First. Then. ")]]


def test_lists_may_be_json_in_a_text_column(tmp_path: Path) -> None:
    coded = base64.b64encode(wide(11)).decode()
    table = pa.table({"texts": ['["one", null]'], "images": [json.dumps([None, coded])]})
    pq.write_table(table, tmp_path / "0.parquet")
    sample = SIDE_BY_SIDE | {"encoding": "base64"}
    assert seen(indexed(write_card(tmp_path, "0.parquet", sample, format="parquet")).sample(0)) == ["one", 11]


def test_a_page_in_a_tar_names_its_files(tmp_path: Path) -> None:
    record = {"texts": ["a", None, "b", None], "images": [None, "Cat.v2.JPG", None, "dog.jpg"]}
    index = tar_page(tmp_path, IN_TARS, record, {"dog.jpg": wide(12), "Cat.v2.JPG": wide(11)})
    assert seen(index.sample(1)) == ["a", 11, "b", 12]


def test_numbered_files_are_taken_by_their_place_among_the_pictures(tmp_path: Path) -> None:
    record = {"texts": [None, "a", None, None], "images": ["https://x/1", None, "https://x/2", None]}
    files = {"2.jpg": wide(13), "0.png": wide(11), "1.jpg": wide(12), "10.jpg": wide(99)}
    index = tar_page(tmp_path, IN_TARS | {"numbered": ["jpg", "PNG"]}, record, files)
    assert seen(index.sample(1)) == [11, "a", 12, 13]


def test_neighbouring_texts_are_joined_and_blank_ones_are_nothing(tmp_path: Path) -> None:
    def page(folder: str, **options: str) -> list[str | int]:
        (tmp_path / folder).mkdir()
        record = {"texts": ["a", "b", " ", "", None, "c", "\n"], "images": [None] * 4 + ["0.jpg"] + [None] * 2}
        return seen(tar_page(tmp_path / folder, IN_TARS | options, record, {"0.jpg": wide(11)}).sample(1))

    assert page("paragraphs") == ["a\n\nb", 11, "c"]
    assert page("together", join="") == ["ab", 11, "c"]
    assert page("marked", join=" | ") == ["a | b", 11, "c"]


# ---------------------------------------------------------------------------------------------------------------- MMC4


def document(*places: int, sentences: Sequence[str] = ("One.", "Two.", "Three.")) -> dict[str, Any]:
    """An MMC4 document with a picture `n.jpg` before the sentence of each place."""
    info = [{"image_name": f"{n}.jpg", "raw_url": "http://x", "matched_text_index": at} for n, at in enumerate(places)]
    return {"url": "http://x", "text_list": list(sentences), "image_info": info, "similarity_matrix": [[0.2]]}


def test_pictures_of_mmc4_stand_before_the_sentence_they_match(tmp_path: Path) -> None:
    files = {f"{n}.jpg": wide(10 + n) for n in range(4)}
    index = tar_page(tmp_path, MMC4, document(2, 0, 2, 1), files)
    assert seen(index.sample(1)) == [11, "One.", 13, "Two.", 10, 12, "Three."]


def test_sentences_of_mmc4_are_joined_by_a_space(tmp_path: Path) -> None:
    assert seen(tar_page(tmp_path, MMC4, document(2), {"0.jpg": wide(10)}).sample(1)) == ["One. Two.", 10, "Three."]


def test_pictures_in_the_json_are_read_from_base64(tmp_path: Path) -> None:
    record = document(1)
    record["image_info"][0]["image_base64"] = base64.b64encode(wide(21)).decode()
    index = tar_page(tmp_path, MMC4 | {"file": "image_base64", "encoding": "base64"}, record, {})
    assert seen(index.sample(1)) == ["One.", 21, "Two. Three."]


def test_mmc4_in_parquet_holds_its_pictures_in_the_entries(tmp_path: Path) -> None:
    info = [{"image": {"bytes": wide(11), "path": None}, "matched_text_index": 1}]
    pq.write_table(pa.table({"text_list": [["a", "b"]], "image_info": [info]}), tmp_path / "0.parquet")
    sample = {"texts": "text_list", "images": "image_info", "at": "matched_text_index", "file": "image"}
    assert seen(indexed(write_card(tmp_path, "0.parquet", sample, format="parquet")).sample(0)) == ["a", 11, "b"]


# ---------------------------------------------------------------------------------------------------- missing pictures

INCOMPLETE = {"texts": ["a", None, None, "b", None], "images": [None, "https://x/1.jpg", "0.jpg", None, None]}


def test_a_picture_that_is_not_there_is_an_error_of_its_page(tmp_path: Path) -> None:
    index = tar_page(tmp_path, IN_TARS, INCOMPLETE, {"0.jpg": wide(11)})
    (reason,) = reasons(index)
    assert reason.startswith(
        "missing picture: no bytes for picture 0 of the page, 'https://x/1.jpg'; the record has 0.jpg"
    )
    assert "`missing: drop`" in reason
    assert len(index) == 1


def test_dropped_pictures_are_counted_whenever_the_index_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = tar_page(tmp_path, IN_TARS | {"missing": "drop"}, INCOMPLETE, {"0.jpg": wide(11)})
    assert seen(index.sample(1)) == ["a", 11, "b"]
    assert sum(shard.dropped for shard in index.shards) == 2
    caplog.clear()
    opened = indexed(index.card.path)
    assert "2 pictures that were not in their records are left out" in opened.summary()
    assert "2 pictures" in caplog.text


def test_texts_around_a_dropped_picture_become_neighbours(tmp_path: Path) -> None:
    record = {"texts": ["a", None, "b"], "images": [None, "gone.jpg", None]}
    assert seen(tar_page(tmp_path, IN_TARS | {"missing": "drop"}, record, {}).sample(1)) == ["a\n\nb"]


def test_a_damaged_picture_is_an_error_whatever_may_be_missing(tmp_path: Path) -> None:
    record = {"texts": ["a", None], "images": [None, "0.jpg"]}
    index = tar_page(tmp_path, IN_TARS | {"missing": "drop"}, record, {"0.jpg": b"no picture"})
    assert reasons(index)[0].startswith("broken media")


@pytest.mark.parametrize(
    "files", [pa.list_(pa.string()), pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
)
def test_addresses_and_paths_are_never_opened(tmp_path: Path, files: pa.DataType) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "0.jpg").write_bytes(wide(11))
    with RangeServer(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.failures = 9
        for number, address in enumerate((f"{server.url}/0.jpg", str(tmp_path / "served" / "0.jpg"))):
            folder = tmp_path / str(number)
            folder.mkdir()
            entry = address if files.value_type == pa.string() else {"bytes": None, "path": address}
            images = pa.array([[None, entry]], files)
            assert seen(parquet_page(folder, ["words", None], images, missing="drop").sample(0)) == ["words"]
            with pytest.raises(IndexingError, match=r"missing picture: .* Addresses are not fetched"):
                parquet_page(folder, ["words", None], images)
        assert server.failures == 9  # a request would have taken one
        server.shutdown()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"texts": ["a"], "images": [None, None]}, "broken page: 1 'json.texts' beside 2 'json.images'"),
        ({"texts": ["a", "b"], "images": [None, "0.jpg"]}, "broken page: a text and a picture at place 1"),
        ({"texts": ["a", None], "images": [None, None]}, "missing picture: no bytes for picture 0 of the page, None"),
        ({"texts": ["a", None], "images": [None, 7]}, "no file: picture 0 of the page is a int"),
        ({"texts": ["a", None], "images": [None, "empty.jpg"]}, "missing picture"),
        ({"texts": [["a"]], "images": [None]}, "not a text: 'json.texts' holds a list"),
        ({"texts": ["\ud800"], "images": [None]}, "text is not UTF-8"),
        ({"texts": "a", "images": [None]}, "broken JSON: 'json.texts'"),
        ({"texts": {"a": 1}, "images": [None]}, "broken page: 'json.texts' holds a dict, not a list"),
        ({"texts": ["a"]}, "missing field: 'json.images'"),
        ({"images": [None]}, "missing field: 'json.texts'"),
        ({"texts": [], "images": []}, "empty text: the page holds no words"),
        ({"texts": [None], "images": ["0.jpg"]}, "empty text: the page holds no words"),
        ({"texts": [" "], "images": [None]}, "empty text: the page holds no words"),
    ],
)
def test_a_broken_page_is_an_error_with_its_reason(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    index = tar_page(tmp_path, IN_TARS, record, {"0.jpg": wide(11)})
    assert reasons(index)[0].startswith(reason)
    assert len(index) == 1


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image_name": "0.jpg", "matched_text_index": 3}, "'matched_text_index' of picture 0 is 3, of 3 texts"),
        ({"image_name": "0.jpg", "matched_text_index": -1}, "'matched_text_index' of picture 0 is -1"),
        ({"image_name": "0.jpg", "matched_text_index": 1.0}, "'matched_text_index' of picture 0 is 1.0"),
        ({"image_name": "0.jpg", "matched_text_index": True}, "'matched_text_index' of picture 0 is True"),
        ({"image_name": "0.jpg"}, "'matched_text_index' of picture 0 is None"),
        ("0.jpg", "'matched_text_index' of picture 0 is None"),
    ],
)
def test_a_picture_that_matches_no_sentence_is_an_error(tmp_path: Path, entry: Any, reason: str) -> None:
    index = tar_page(tmp_path, MMC4, document() | {"image_info": [entry]}, {"0.jpg": wide(11)})
    assert reasons(index)[0].startswith(f"broken page: {reason}")


def test_base64_that_is_none_is_an_error() -> None:
    mapping = parse_mapping(SIDE_BY_SIDE | {"encoding": "base64"})
    with pytest.raises(BrokenSample, match=r"broken base64: 'picture 0' holds 'images/1\.jpg'"):
        mapping.parts({"texts": ["a", None], "images": [None, "images/1.jpg"]}, 0)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"texts": "a"}, "sample: missing key 'images'; the keys are texts, images, at, file"),
        (SIDE_BY_SIDE | {"picture": "b"}, "sample: unknown key 'picture', allowed are texts, images, at"),
        (SIDE_BY_SIDE | {"texts": ["a"]}, r"sample\.texts: \['a'\], expected a text"),
        (SIDE_BY_SIDE | {"missing": "skip"}, r"sample\.missing: 'skip', allowed are error, drop"),
        (SIDE_BY_SIDE | {"encoding": "hex"}, r"sample\.encoding: 'hex', allowed are base64"),
        (SIDE_BY_SIDE | {"join": 1}, r"sample\.join: 1, expected a text"),
        (SIDE_BY_SIDE | {"at": "n"}, "`file` names their key with the picture"),
        (SIDE_BY_SIDE | {"numbered": "jpg", "file": "image"}, r"sample\.numbered: .* keep one"),
        (SIDE_BY_SIDE | {"numbered": 3}, r"sample\.numbered: 3, expected the name"),
    ],
)
def test_a_card_with_a_mistake_names_the_key_and_what_is_allowed(
    tmp_path: Path, sample: dict[str, Any], message: str
) -> None:
    with pytest.raises(CardError, match=message):
        Card.load(write_card(tmp_path, "0.tar", sample))


# --------------------------------------------------------------------------------------------------------------- order

page_contents = st.lists(st.one_of(st.text(max_size=4), st.integers(0, 255)), max_size=12)
"""Texts, and pictures as one byte each."""


def flat(parts: Sequence[Any], join: str) -> list[str | int]:
    """Texts cut where they were joined, and the byte of each picture."""
    return [one for part in parts for one in (part.text.split(join) if isinstance(part, Text) else [part.data[0]])]


@given(page_contents, st.sampled_from(["list", "names", "numbered"]))
def test_a_page_keeps_the_order_of_its_texts_and_pictures(contents: list[str | int], form: str) -> None:
    join = "\x00|"
    contents = [one.replace("\x00", "").strip(PADDING) if isinstance(one, str) else one for one in contents]
    texts = [one if isinstance(one, str) else None for one in contents]
    files = [bytes([one]) for one in contents if isinstance(one, int)]
    names = {"names": [f"{n}.jpg" for n in range(len(files))], "numbered": ["http://x"] * len(files)}.get(form, files)
    following = iter(names)
    fields: dict[str, Any] = {"texts": texts, "images": [next(following) if text is None else None for text in texts]}
    fields |= {f"{n}.jpg": file for n, file in enumerate(files)} if form != "list" else {}
    mapping = parse_mapping(SIDE_BY_SIDE | {"join": join} | ({"numbered": "jpg"} if form == "numbered" else {}))
    expected = [one for one in contents if isinstance(one, int) or not is_blank(one)]
    if not any(isinstance(one, str) for one in expected):
        with pytest.raises(BrokenSample, match="no words"):
            mapping.parts(fields, 0)
        return
    parts = mapping.parts(fields, 0)
    assert flat(parts, join) == expected
    assert not any(isinstance(one, Text) and isinstance(other, Text) for one, other in itertools.pairwise(parts))


@given(st.lists(st.lists(st.integers(0, 255), max_size=3), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_matched_pictures_keep_their_order_before_each_text(before: list[list[int]], random: Any) -> None:
    entries = [{"at": place, "file": bytes([one])} for place, ones in enumerate(before) for one in ones]
    random.shuffle(entries)
    mapping = parse_mapping(SIDE_BY_SIDE | {"at": "at", "file": "file"})
    parts = mapping.parts({"texts": [f"t{n}" for n in range(len(before))], "images": entries}, 0)
    expected = [
        one
        for place in range(len(before))
        for one in [*(entry["file"][0] for entry in entries if entry["at"] == place), f"t{place}"]
    ]
    assert flat(parts, " ") == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["bytes", "at", "file"]), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries({}, optional={"texts": json_values, "images": json_values, "0.jpg": json_values}),
    st.sampled_from([{}, {"encoding": "base64"}, {"numbered": "jpg"}, {"at": "at", "file": "file"}, {"file": "file"}]),
    st.sampled_from(["error", "drop"]),
)
def test_whatever_a_record_holds_it_is_a_page_or_a_broken_sample(
    fields: dict[str, Any], options: dict[str, str], missing: str
) -> None:
    mapping = parse_mapping(SIDE_BY_SIDE | options | {"missing": missing})
    try:
        parts = mapping.parts(fields, 0)
    except BrokenSample:
        return
    assert all(isinstance(part, Text | Image) for part in parts)
    assert mapping.dropped(fields) >= 0


# ------------------------------------------------------------------------------------------------------------ training


def pages(rows: range) -> Iterator[tuple[list[str | None], list[bytes | None]]]:
    """Texts and pictures of pages, of one to four pictures that no two pages share."""
    for row in rows:
        texts: list[str | None] = [f"page {row} begins."]
        images: list[bytes | None] = [None]
        for number in range(1 + row % 4):
            texts += [None, f"after {number}."]
            images += [picture(100 * row + number, 20 + 4 * number), None]
        yield texts, images


@pytest.fixture
def planned(tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path) -> PlannedData:
    """Packs of OBELICS' form in parquet, MMC4's in tars and text in JSON lines."""
    table = list(pages(range(8)))
    columns = {"texts": [texts for texts, _ in table], "images": [images for _, images in table]}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", row_group_size=3)
    obelics = write_card(tmp_path, "0.parquet", SIDE_BY_SIDE, format="parquet", name="obelics")
    members = []
    for number, (texts, images) in enumerate(pages(range(8, 16))):
        files = [(f"{number}.{n}.jpg", image) for n, image in enumerate(one for one in images if one)]
        record = document(*range(1, len(files) + 1), sentences=[text for text in texts if text])
        members += [(f"{number}.json", as_json(record)), *files]
    write_tar(tmp_path / "0.tar", members)
    mmc4 = write_card(tmp_path, "0.tar", MMC4, name="mmc4")
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"text": f"Line {n} é."}) + "\n" for n in range(8)))
    lines = write_card(tmp_path, "0.jsonl", [{"text": "text"}], format="jsonl", name="lines")

    cards = corpus | {"obelics": obelics, "mmc4": mmc4, "lines": lines}
    recipe = Recipe.load(write_recipe(tmp_path, cards, tokenizer_folder, ["obelics", "mmc4", "lines"]))
    blueprint = Blueprint.of(recipe)
    return open_data(recipe, blueprint, recipe.data.sources, tmp_path / "plan", epochs=1.0)


def expected(name: str, row: int) -> list[str | bytes]:
    """Texts and pictures of a sample of `planned`, in order."""
    if name == "lines":
        return [f"Line {row} é."]
    ((texts, images),) = pages(range(row + 8 * (name == "mmc4"), row + 1 + 8 * (name == "mmc4")))
    return [one for pair in zip(texts, images, strict=True) for one in pair if one is not None]


def test_pages_and_lines_reach_the_batches_whole_and_in_order(planned: PlannedData) -> None:
    planned.plan.ensure(1000)
    materialiser, processor = planned.materialiser(), planned.blueprint.processor
    seen_rows = []
    for pack in range(planned.plan.total_packs() or 0):
        batch = materialiser[MicroStep(0, (pack,))]
        assert not batch.broken
        for (source, shard, row), start, end in zip(
            batch.rows.tolist(), batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True
        ):
            index = planned.sources[source].index
            assert index is not None
            row += int(index.starts[shard])
            contents = expected(planned.names[source], row)
            sample = index.sample(row)
            assert [part.text if isinstance(part, Text) else part.data for part in sample.parts] == contents
            facts = iter(index.facts(row))
            laid = [
                one if isinstance(one, str) else processor.media_length(Modality.IMAGE, next(facts)) for one in contents
            ]
            *found, last = runs(processor, batch.tokens[start:end], batch.modality[start:end])
            assert [*found, str(last).removesuffix("<|im_end|>")] == laid
            seen_rows.append((planned.names[source], row))
    assert sorted(seen_rows) == [(name, row) for name in ("lines", "mmc4", "obelics") for row in range(8)]


def runs(processor: Processor, tokens: Tensor, modality: Tensor) -> Iterator[str | int]:
    """The words of every run of text in a document, and the length of every run of picture slots."""
    for kind, group in itertools.groupby(zip(modality.tolist(), tokens.tolist(), strict=True), lambda pair: pair[0]):
        ids = [token for _, token in group]
        yield processor.text.decode(ids) if kind == Modality.TEXT else len(ids)


# ------------------------------------------------------------------------------------------------------------- builder


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Two files of documents; 1.jpg is not there, 2.jpg is damaged, and so is the last line."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(wide(10))
    (tmp_path / "pictures" / "2.jpg").write_bytes(b"no picture")
    (tmp_path / "docs").mkdir()
    out = document(0) | {"image_info": [{"image_name": "../secret.jpg", "matched_text_index": 0}]}
    odd = [document(0) | {"image_info": [{"image_name": name, "matched_text_index": 0}]} for name in ("\0", "x" * 999)]
    first = [document(1), document(2, 1), document(0, 0, 1)]
    for name, lines in (("a", first), ("b", [document(9), document(), {"text_list": ["a"]}, out, *odd])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "docs" / f"{name}.jsonl").write_text(text + ('{"text_list": [' if name == "b" else ""))
    (tmp_path / "secret.jpg").write_bytes(wide(99))
    return tmp_path


def built_pages(folder: Path) -> list[list[str | int]]:
    index = indexed(folder / "card.yaml")
    assert not reasons(index)
    return [seen(index.sample(row)) for row in range(len(index))]


def test_mmc4_documents_with_all_their_pictures_become_shards(documents: Path) -> None:
    options = {"source": documents / "docs", "images": documents / "pictures", "validation": 0.0}
    report = build("mmc4", documents / "out", **options)
    assert built_pages(documents / "out") == [["One.", 10, "Two. Three."], ["One. Two. Three."]]
    assert report.samples == {"train": 2, "validation": 0}
    assert report.skipped == {
        "the file is not there": 4,
        "broken page": 1,
        "no list of image_info": 1,
        "the path of a picture leads out of the folder": 1,
        "truncated shard": 1,
    }


def test_mmc4_documents_may_do_without_pictures_that_are_missing_or_broken(documents: Path) -> None:
    options = {"source": str(documents / "docs"), "images": str(documents / "pictures"), "missing": "drop"}
    report = build("mmc4", documents / "out", **options, validation="0")
    assert built_pages(documents / "out") == [
        ["One.", 10, "Two. Three."],
        ["One. Two.", 10, "Three."],
        [10, "One. Two. Three."],
        ["One. Two. Three."],
        ["One. Two. Three."],
        ["One. Two. Three."],
    ]
    assert report.samples["train"] == 6
    assert report.skipped["the file is not there (the document is kept)"] == 4
    assert report.skipped["the path of a picture leads out of the folder"] == 1


def test_the_mmc4_builder_says_what_it_lacks(documents: Path) -> None:
    with pytest.raises(FileNotFoundError, match="are to be unzipped"):
        build("mmc4", documents / "out", source=documents / "pictures", images=documents / "pictures")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        build("mmc4", documents / "out", source=documents / "docs", images=documents / "photos")
    with pytest.raises(ValueError, match="allowed are error, drop"):
        build("mmc4", documents / "out", source=documents / "docs", images=documents / "pictures", missing="skip")
