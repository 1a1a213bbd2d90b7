"""Pictures as codes, from shards to a trained decoder: what is written beside the shards is what the model reads."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from typer.testing import CliRunner

from mm import media
from mm.cli import app
from mm.configure import RecipeError
from mm.data import columns
from mm.data.card import Card
from mm.data.codes import CodeColumn, CodedSamples
from mm.data.columns import ColumnError, ColumnReader, Row
from mm.data.drops import drop
from mm.data.index import Index, SplitSamples, index_card
from mm.model.multimodal import ModelOptions
from mm.packing.batch import IGNORE
from mm.packing.collate import Document, LengthMismatch, Processor, Spelling
from mm.packing.materialise import MicroStep
from mm.packing.plan import PlanChanged
from mm.report.packs import inspect_page
from mm.sample import BrokenSample, Codes, Image, Modality, Part, Sample, Text
from mm.score.tokenize import TokenizerScorer, tokenize
from mm.tokenizers.text import Around, TextTokenizer
from mm.tokenizers.vocabulary import Vocabulary
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.conftest import once
from tests.patch_colours import PatchColours, Patches
from tests.shard_files import pairs, write_card, write_tar
from tests.small_world import DECODER, broken_picture, losses, picture, seen, train_here, train_together, write_recipe

SPEC = {"_target_": "tests.patch_colours.PatchColours"}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
ORDERS = {
    "parts": [{"image": "png"}, {"text": "txt"}],
    "orders": [{"p": 0.5, "parts": ["image", "text"]}, {"p": 0.5, "parts": ["text", "image"]}],
}


def scene(seed: int) -> tuple[bytes, str]:
    """A picture of one colour over another, of 1 to 3 by 2 to 4 patches, and what it shows."""
    draw = random.Random(seed)
    above, below = draw.choices(list(COLOURS), k=2)
    width, half = 8 * draw.randint(1, 3), 8 * draw.randint(1, 2)
    canvas = PillowImage.new("RGB", (width, 2 * half), COLOURS[below])
    canvas.paste(COLOURS[above], (0, 0, width, half))
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue(), f"{above} over {below}"


def write_scenes(folder: Path, name: str, rows: int, shards: int = 2, sample: Any = None) -> Path:
    """A card of scenes, image before text if no other form is given."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        members = []
        for row in range(shard * rows // shards, (shard + 1) * rows // shards):
            data, words = scene(row)
            members += [(f"{row:06d}.png", data), (f"{row:06d}.txt", words.encode())]
        paths.append(write_tar(folder / f"{name}-{shard}.tar", members).name)
    return write_card(folder, paths, sample or [{"image": "png"}, {"text": "txt"}], name=name)


def indexed(card: Path, folder: Path) -> Index:
    return index_card(Card.load(card), "train", folder, progress=False)


def codes_of(data: bytes, tokenizer: PatchColours | None = None) -> tuple[int, ...]:
    """The codes of one picture alone."""
    tokenizer = tokenizer or PatchColours()
    item = media.decode(Image(data))
    grid = tokenizer.transform.grid(media.measure(item))
    (codes,) = tokenizer.codes_of([tokenizer.transform.prepare(item)], [grid])
    return tuple(codes.tolist())


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_scenes(tmp_path, "scenes", rows=24)


# ------------------------------------------------------------------------------------------------------- documents


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Processor:
    """Pictures and recordings as codes. The text's ids are 259 bytes and special tokens."""
    vocabulary = Vocabulary.of(tokenizer.vocabulary, {Modality.IMAGE: 16, Modality.SPEECH: 8})
    return Processor(
        tokenizer, {kind: Spelling(Patches(), book, "made up") for kind, book in vocabulary.codebooks.items()}
    )


IMAGE, SPEECH = 259, 259 + 2 + 16
"""Ids at which the two codebooks begin: begin, end, codes."""

PARTS = st.one_of(
    st.builds(Text, st.text("abc <|>", min_size=1, max_size=6), st.booleans()),
    st.builds(Codes, st.just(Modality.IMAGE), st.lists(st.integers(0, 15), min_size=1, max_size=5).map(tuple)),
    st.builds(Codes, st.just(Modality.SPEECH), st.lists(st.integers(0, 7), min_size=1, max_size=5).map(tuple)),
)


def expected(parts: Sequence[Part], tokenizer: TextTokenizer) -> list[tuple[int, float, int]]:
    """(id, weight, modality) of every token of a page, by hand."""
    found: list[tuple[int, float, int]] = []
    weight = 0.0
    for part in parts:
        if isinstance(part, Text):
            weight = float(part.loss)
            found += [(number, weight, 0) for number in tokenizer.encode(part.text)]
        else:
            assert isinstance(part, Codes)
            weight, begin = 1.0, {Modality.IMAGE: IMAGE, Modality.SPEECH: SPEECH}[part.modality]
            found += [
                (begin, 1.0, 0),
                *((begin + 2 + code, 1.0, part.modality) for code in part.ids),
                (begin + 1, 1.0, 0),
            ]
    return [*found, (tokenizer.end, weight, 0)]


@settings(deadline=None)
@given(samples=st.lists(st.lists(PARTS, min_size=1, max_size=5), min_size=1, max_size=4))
def test_packed_documents_hold_begin_codes_and_end_where_their_items_stand(
    samples: list[list[Part]], processor: Processor
) -> None:
    documents = [processor.document(Sample("test", "", tuple(parts))) for parts in samples]
    batch = processor.collate([documents], [[(0, 0, row) for row, _ in enumerate(samples)]])
    whole = [expected(parts, processor.text) for parts in samples]
    assert batch.offsets.diff().tolist() == [len(tokens) for tokens in whole]
    assert batch.tokens.tolist() == [number for tokens in whole for number, _, _ in tokens]
    assert batch.modality.tolist() == [kind for tokens in whole for _, _, kind in tokens]
    labels = [
        (following[0], following[1]) if following[1] else (IGNORE, 0.0)
        for tokens in whole
        for _, following in pairwise([*tokens, (IGNORE, 0.0, 0)])
    ]
    assert list(zip(batch.labels.tolist(), batch.weights.tolist(), strict=True)) == labels
    assert not batch.media


def test_text_around_an_item_stands_around_its_codes(tokenizer_folder: Path, processor: Processor) -> None:
    text = TextTokenizer.load(str(tokenizer_folder))
    *arguments, _, _ = text.__reduce__()[1]
    around = TextTokenizer(*arguments, around={"image": Around("(", ")")})  # type: ignore[misc]
    document = Processor(around, processor.entrances).document(Sample("", "", (Codes(Modality.IMAGE, (5,)),)))
    (before,), (after,) = around.encode("("), around.encode(")")
    assert document.tokens.tolist() == [before, IMAGE, IMAGE + 2 + 5, IMAGE + 1, after, around.end]
    assert document.weights.tolist() == [0, 1, 1, 1, 0, 1]


def targets(document: Document) -> list[int]:
    return document.tokens[document.weights > 0].tolist()


def test_in_a_chat_codes_bear_loss_in_the_turns_of_the_assistant_only(processor: Processor) -> None:
    end_of_turn = processor.text.end
    asked, drawn = Codes(Modality.IMAGE, (1, 2), "user"), Codes(Modality.IMAGE, (3, 4), "assistant")
    described = Sample("", "", (asked, Text("What?", False, "user"), Text("a", True, "assistant")))
    assert targets(processor.document(described)) == [*processor.text.encode("a"), end_of_turn]
    drawing = Sample("", "", (Text("Draw.", False, "user"), drawn))
    assert targets(processor.document(drawing)) == [IMAGE, IMAGE + 5, IMAGE + 6, IMAGE + 1, end_of_turn]


def test_codes_are_not_cut(processor: Processor) -> None:
    document = processor.document(Sample("", "", (Text("ab"), Codes(Modality.IMAGE, (1, 2, 3)))))
    assert len(document.cut(7)) == 7
    with pytest.raises(LengthMismatch, match="media run"):
        document.cut(6)


def test_a_file_where_codes_are_asked_for_is_an_error(processor: Processor) -> None:
    with pytest.raises(
        RecipeError, match=r"takes image as codes \(model.tokenizers.image\) and the sample holds a file"
    ):
        processor.document(Sample("", "", (Image(picture(1)),)))


# --------------------------------------------------------------------------------------------------- writing codes


def test_codes_are_written_row_for_row_a_list_an_item(tmp_path: Path) -> None:
    members = []
    for row in range(7):
        members += [(f"{row}.a.png", picture(row, 8 + 5 * row, 20)), (f"{row}.txt", b"words")]
        members += [(f"{row}.b.png", picture(row + 50, 30, 9 + row))]
    shard = write_tar(tmp_path / "0.tar", members)
    card = write_card(tmp_path, shard.name, [{"image": "a.png"}, {"text": "txt"}, {"image": "b.png"}])
    index = indexed(card, tmp_path / "index")
    scorer = TokenizerScorer(SPEC)
    counts = tokenize(index, SPEC, batch=3, progress=False)
    found = columns.load(index, "image_codes", scorer.fingerprint).to_pylist()
    alone = [[list(codes_of(part.data)) for part in index.sample(row).media] for row in range(7)]
    assert found == alone
    assert counts == (14, 0, sum(len(item) for row in alone for item in row))


def test_a_picture_that_cannot_be_decoded_is_null_counted_and_later_padding(tmp_path: Path) -> None:
    data = [picture(1), broken_picture(2), picture(3)]
    members = [member for n, png in enumerate(data) for member in ((f"{n}.png", png), (f"{n}.txt", b"w"))]
    shard = write_tar(tmp_path / "0.tar", members)
    index = indexed(write_card(tmp_path, shard.name, [{"image": "png"}, {"text": "txt"}]), tmp_path / "index")
    assert tokenize(index, SPEC, progress=False)[:2] == (3, 1)
    samples = coded(index)
    assert samples.sample(0, 2).parts[0] == Codes(Modality.IMAGE, codes_of(data[2]))
    with pytest.raises(BrokenSample, match="could not be decoded when they were computed"):
        samples.sample(0, 1)


def coded(index: Index, spec: dict[str, Any] = SPEC) -> CodedSamples:
    split = SplitSamples(index.card, "train", index.folder, [entry.shard for entry in index.shards], index)
    return CodedSamples(split, [TokenizerScorer(spec).column])


def test_processes_write_what_one_writes_and_a_second_pass_only_what_is_missing(scenes: Path, tmp_path: Path) -> None:
    one, two = indexed(scenes, tmp_path / "one"), indexed(scenes, tmp_path / "two")
    counts = tokenize(one, SPEC, progress=False)
    assert counts == tokenize(two, SPEC, processes=2, progress=False)
    assert counts.items == 24
    files = {path.name: path for path in (tmp_path / "one" / "columns").glob("image_codes-*/*.parquet")}
    assert len(files) == 2
    for path in (tmp_path / "two" / "columns").glob("image_codes-*/*.parquet"):
        assert path.read_bytes() == files[path.name].read_bytes()
    lost, kept = files.values()
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    tokenize(one, SPEC, progress=False)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before


class OneTooMany(PatchColours):
    """A tokenizer whose grid does not tell what it gives."""

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().encode(patches), torch.zeros(1, dtype=torch.int64)])


def test_a_tokenizer_that_gives_other_codes_than_its_grid_promises_is_an_error(scenes: Path, tmp_path: Path) -> None:
    spec = {"_target_": "tests.test_early_fusion.OneTooMany"}
    with pytest.raises(RuntimeError, match=r"OneTooMany gave \d+ codes .* for grids of \d+ places"):
        tokenize(indexed(scenes, tmp_path / "index"), spec, progress=False)


# --------------------------------------------------------------------------------------------------- reading codes


def test_samples_come_with_codes_in_the_place_of_their_files_whatever_the_order(scenes: Path, tmp_path: Path) -> None:
    index = indexed(write_scenes(tmp_path, "ordered", 24, sample=ORDERS), tmp_path / "index")
    tokenize(index, SPEC, progress=False)
    samples = pickle.loads(pickle.dumps(coded(index)))
    data, words = scene(15)
    drawn = Codes(Modality.IMAGE, codes_of(data))
    assert samples.sample(1, 3, choice=0).parts == (drawn, Text(words))
    assert samples.sample(1, 3, choice=1).parts == (Text(words), drawn)


def test_a_reader_keeps_no_more_than_its_share_of_a_column_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "0.tar", pairs(200))
    index = indexed(write_card(tmp_path, shard.name), tmp_path / "index")

    def values(rows: Iterator[Row]) -> Iterator[list[int]]:
        return ([number] * 100 for number, _ in enumerate(rows))

    columns.ensure(index, "many", "1", values, columns.pa.list_(columns.pa.int32()), progress=False, group=10)
    monkeypatch.setattr(columns, "KEPT", 3 * 10 * 100 * 4 + 500)
    reader = ColumnReader(index.folder, "many", "1")
    for row in random.Random(0).sample(range(200), 200):
        assert reader.value(index.shards[0], row).as_py() == [row] * 100
        assert sum(group.nbytes for group in reader._groups.values()) <= columns.KEPT


@pytest.mark.parametrize("spoiled", ["missing", "another tokenizer", "another K", "other rows"])
def test_codes_that_are_not_those_of_the_recipe_are_refused_with_the_command_to_run(
    spoiled: str, scenes: Path, tmp_path: Path
) -> None:
    index = indexed(scenes, tmp_path / "index")
    column = TokenizerScorer(SPEC).column
    if spoiled != "missing":
        tokenize(index, SPEC, progress=False)
        column.check_computed(index)
    if spoiled == "another tokenizer":
        column = replace(column, tokenizer="retrained")
    if spoiled == "another K":
        column = replace(column, size=65)
    if spoiled == "other rows":
        write_tar(tmp_path / "scenes-1.tar", pairs(3))
        write_scenes(tmp_path, "scenes", rows=26)
        index = indexed(scenes, tmp_path / "index")
    with pytest.raises(
        ColumnError, match=rf"`mm data tokenize {scenes} --split train --folder {tmp_path}/index --with"
    ):
        column.check_computed(index)
    samples = CodedSamples(
        SplitSamples(index.card, "train", index.folder, [one.shard for one in index.shards], index), [column]
    )
    with pytest.raises(ColumnError, match="computed"):
        samples.sample(1, 0)


def test_codes_of_another_number_of_items_are_refused(scenes: Path, tmp_path: Path) -> None:
    index = indexed(scenes, tmp_path / "index")
    column = TokenizerScorer(SPEC).column

    def doubled(rows: Iterator[Row]) -> Iterator[list[list[int]]]:
        return ([[1], [2]] for _ in rows)

    columns.ensure(index, column.name, column.fingerprint, doubled, column.type, progress=False)
    with pytest.raises(ColumnError, match="1 image items, and codes of 2"):
        coded(index).sample(0, 0)


def test_the_weights_of_a_tokenizer_tell_its_column_from_anothers(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).random((16, 3), np.float32))
    one, other = ({**SPEC, "colours": str(tmp_path / f"{name}.npy")} for name in ("one", "other"))
    assert TokenizerScorer(one).fingerprint == TokenizerScorer(one).fingerprint
    assert TokenizerScorer(one).fingerprint != TokenizerScorer(other).fingerprint


# -------------------------------------------------------------------------------------------------------- training


def fusion_recipe(folder: Path, tokenizer: Path, sample: Any = ORDERS, **changes: Any) -> Path:
    """A recipe over scenes as codes, and the column it needs unless `changes` say so."""
    card = write_scenes(folder, "scenes", rows=48, shards=4, sample=sample)
    held_out = write_scenes(folder / "held_out", "held_out", rows=6, shards=1)
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(SPEC))
    options: dict[str, Any] = {
        "steps": 6,
        "model": {
            "decoder": {"config": DECODER | {"vocabulary": 259 + 2 + 64}},
            "tokenizers": {"image": str(folder / "tokenizer.yaml")},
        },
        "packing": {"capacity": 64, "batch": 2, "window": 32},
    }
    cards = {"scenes": card, "held_out": held_out, "text": held_out}
    return write_recipe(folder, cards, tokenizer, ["scenes"], **options | changes)


def index_of(recipe: Path) -> Path:
    return recipe.parent / "held_out" / "cache" / "index"


def run_tokenize(recipe: Path, *options: str) -> str:
    """`mm data tokenize` for both cards of a recipe; what it says of the first."""
    said = []
    for card in (recipe.parent / "scenes.yaml", recipe.parent / "held_out" / "held_out.yaml"):
        command = ["data", "tokenize", str(card), "--with", str(recipe.parent / "tokenizer.yaml")]
        result = CliRunner().invoke(app, [*command, "--folder", str(index_of(recipe)), *options])
        assert result.exit_code == 0, result.output
        said.append(result.output)
    return said[0]


@pytest.fixture(scope="module")
def fusion(session_folder: Path, tokenizer_folder: Path) -> Path:
    """A recipe over scenes in both orders whose codes are written."""

    def make(folder: Path) -> None:
        run_tokenize(fusion_recipe(folder, tokenizer_folder))

    return once(session_folder / "fusion", make) / "recipe.yaml"


def test_index_tokenize_train_and_the_loss_of_both_modalities_falls(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = fusion_recipe(tmp_path, tokenizer_folder, steps=60)
    with pytest.raises(ColumnError, match=r"of 4 shards 4 have no image codes .* `mm data tokenize"):
        train_here(recipe)
    patches = sum(width * height // 64 for width, height in (media.facts(Image(scene(row)[0])) for row in range(48)))
    assert f"48 items in 48 samples are {patches} codes; 0 could not be decoded" in run_tokenize(recipe)
    run = train_here(recipe, "optim.lr=1e-2")
    for kind in ("text", "image"):
        curve = losses(run, f"loss/modality/{kind}")
        assert np.mean([curve[step] for step in range(56, 61)]) < 0.5 * curve[1], kind
    assert losses(run, "validation_loss/modality/image")[60] < 3.0


def test_codes_come_before_or_after_their_words_half_of_the_time_drawn_anew_each_epoch(fusion: Path) -> None:
    data = planned(Recipe.load(fusion, ["steps=200"]))
    materialiser = data.materialiser()
    first = []
    orders: dict[tuple[int, int], set[bool]] = {}
    for number in range(400):
        for planned_sample in data.plan.pack(number).samples():
            document = materialiser._document(planned_sample, [])
            begins = bool(document.tokens[0] == 259)
            first.append(begins)
            assert begins == (planned_sample.choice == 0)
            orders.setdefault((planned_sample.shard, planned_sample.row), set()).add(begins)
    assert len(first) > 1000
    assert np.mean(first) == pytest.approx(0.5, abs=0.07)
    assert all(both == {True, False} for both in orders.values())


def test_lengths_are_planned_from_header_facts_and_every_batch_has_them(fusion: Path) -> None:
    data = planned(Recipe.load(fusion))
    for number in range(8):
        batch = data.materialiser()[MicroStep(0, (number,))]
        assert batch.offsets.diff().tolist() == data.plan.pack(number).length.tolist()
        assert not batch.broken
        codes = int((batch.modality == Modality.IMAGE).sum())
        ends = int(((batch.tokens == 259) | (batch.tokens == 260)).sum())
        assert codes + ends == data.plan.media_tokens(number).sum()


def test_codes_of_another_length_than_planned_are_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = fusion_recipe(tmp_path, tokenizer_folder)
    index = indexed(tmp_path / "scenes.yaml", index_of(recipe))
    column: CodeColumn = TokenizerScorer(SPEC).column

    def shorter(rows: Iterator[Row]) -> Iterator[list[list[int]]]:
        return ([list(codes_of(row(0).media[0].data))[1:]] for row in rows)

    columns.ensure(index, column.name, column.fingerprint, shorter, column.type, progress=False)
    data = planned(Recipe.load(recipe))
    with pytest.raises(LengthMismatch, match=r"the plan promised \d+ tokens, the sample has \d+"):
        data.materialiser()[MicroStep(0, (0,))]


def test_a_resumed_run_continues_bit_equal(fusion: Path, tmp_path: Path) -> None:
    whole = train_here(fusion, f"run={tmp_path / 'whole'}")
    train_here(fusion, f"run={tmp_path / 'resumed'}", "steps=3")
    resumed = train_here(fusion, f"run={tmp_path / 'resumed'}")
    assert losses(resumed) == losses(whole)
    assert seen(resumed) == seen(whole)


def test_a_lazy_run_trains_as_an_eager_one(fusion: Path, tmp_path: Path) -> None:
    eager = train_here(fusion, f"run={tmp_path / 'eager'}")
    lazy = train_here(fusion, f"run={tmp_path / 'lazy'}", "data.lazy=true")
    assert losses(lazy) == losses(eager)


def test_two_processes_and_loader_workers_see_what_one_sees(fusion: Path, tmp_path: Path) -> None:
    train_together(tmp_path, 2, [[str(fusion), f"run={tmp_path / 'two'}", "data.workers=1"]])
    one = train_here(fusion, f"run={tmp_path / 'one'}")
    assert seen(tmp_path / "two") == seen(one)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)


def test_filters_and_drops_hold_for_codes(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = fusion_recipe(tmp_path, tokenizer_folder)
    run_tokenize(recipe)
    index = indexed(tmp_path / "scenes.yaml", index_of(recipe))
    drop(index, ["row:0"])
    data = planned(Recipe.load(recipe, ["data.sources.scenes.where=width > 8", "steps=null", "epochs=1"]))
    packs = map(data.plan.pack, range(data.plan.planned))
    rows = {(one.shard, one.row) for pack in packs for one in pack.samples()}
    wide = [row for row in range(1, 48) if index.facts(row)[0].width > 8]  # type: ignore[union-attr]
    assert rows == {(row // 12, row % 12) for row in wide}


def test_a_source_without_pictures_needs_no_codes(tmp_path: Path, tokenizer_folder: Path) -> None:
    recipe = fusion_recipe(tmp_path, tokenizer_folder)
    run_tokenize(recipe)
    words = write_scenes(tmp_path / "words", "words", rows=12, sample=[{"text": "txt"}])
    run = train_here(recipe, f"data.sources.words.card={words}")
    assert losses(run, "loss/source/words")


def test_another_tokenizer_is_another_plan(fusion: Path, tmp_path: Path) -> None:
    run = train_here(fusion, f"run={tmp_path / 'run'}", "steps=1")
    np.save(tmp_path / "colours.npy", np.random.default_rng(0).random((64, 3), np.float32))
    recipe = Recipe.load(fusion, [f"run={run}", f"model.tokenizers.image.colours={tmp_path / 'colours.npy'}"])
    for card in (fusion.parent / "scenes.yaml", fusion.parent / "held_out" / "held_out.yaml"):
        tokenize(indexed(card, index_of(fusion)), recipe.model.tokenizers["image"], progress=False)
    with pytest.raises(PlanChanged, match="tokenizer of image"):
        planned(recipe)


def test_a_modality_with_an_encoder_and_a_tokenizer_is_refused() -> None:
    with pytest.raises(RecipeError, match="enters in one of the two ways, so remove one"):
        ModelOptions(encoders={"image": {}}, tokenizers={"image": SPEC})


def test_a_tokenizer_of_another_modality_or_too_small_a_decoder_are_refused(fusion: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.tokenizers.speech is tests.*, which takes image"):
        planned(Recipe.load(fusion, ["model.tokenizers.image=null", f"model.tokenizers.speech={json.dumps(SPEC)}"]))
    with pytest.raises(RecipeError, match="needs at least 325"):
        planned(Recipe.load(fusion, ["model.decoder.config.vocabulary=324"]))


def test_the_pack_inspector_shows_codes_as_a_box_with_their_number(fusion: Path) -> None:
    page = inspect_page(planned(Recipe.load(fusion)), step=0)
    shown = planned(Recipe.load(fusion))
    packs = shown.plan.batch(0)
    boxes = page.count('<span class="codes"')
    assert boxes == sum(len(shown.plan.pack(number).row) for number in packs)
    assert "image: 6 codes" in page
