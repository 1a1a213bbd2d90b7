"""Reference models: folds without leaks, columns that belong to the words, and training by them from end to end."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from mm.cli import app
from mm.configure import RecipeError
from mm.data import columns
from mm.data.card import Card
from mm.data.columns import ColumnError
from mm.data.index import Index, index_card
from mm.model.hub import save_decoder
from mm.packing.batch import IGNORE
from mm.packing.collate import Processor
from mm.packing.materialise import MicroStep
from mm.packing.weights import REFERENCE
from mm.report.packs import inspect_page, view_pack
from mm.report.run import report_of_run
from mm.sample import Codes, Image, Modality, Sample, Text
from mm.score.passes import score_index
from mm.score.reference import ReferenceLM, fold_of, fold_recipe, log_probabilities
from mm.tokenizers.text import Around, TextTokenizer, TokenizerOptions, WordsOnly
from mm.train.export import load_trained
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.conftest import once
from tests.shard_files import write_card, write_tar
from tests.small_world import DECODER, losses, picture, tiny_model, train_here, write_recipe
from tests.test_early_fusion import fusion_recipe, run_tokenize

PRIOR = {"prior": {"_target_": "mm.packing.weights.Prior"}}
CAPTIONS = [f"{count} {colour} cats" for count in ("one", "two", "nine") for colour in ("red", "blue", "pink", "grey")]


def write_captions(folder: Path, captions: list[str] = CAPTIONS, shards: int = 2) -> Path:
    """A card of pictures of noise with captions, two of each; its split ``half`` is the first shard."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [caption for caption in captions for _ in range(2)]
    paths = []
    for shard in range(shards):
        members = []
        for number in range(shard, len(rows), shards):
            members += [(f"{number:04d}.png", picture(number)), (f"{number:04d}.txt", rows[number].encode())]
        paths.append(write_tar(folder / f"captions-{shard}.tar", members).name)
    path = write_card(folder, paths, [{"image": "png"}, {"text": "txt"}], name="captions")
    card = yaml.safe_load(path.read_text())
    card["splits"]["half"] = {"shards": paths[:1]}
    path.write_text(yaml.safe_dump(card))
    return path


def write_reference(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A recipe of a small language model, without data."""
    recipe = {
        "name": "reference",
        "run": str(folder / "reference"),
        "steps": 6,
        "model": {"decoder": {"config": DECODER}},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"workers": 0},
        "packing": {"capacity": 128, "batch": 2, "window": 32},
        "precision": "fp32",
        "optim": {"lr": 1e-2},
        "log_every": 1,
        "log_to": [],
    }
    path = folder / "reference.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def score(card: Path, reference: Path, folder: Path, *more: str) -> str:
    """What ``mm data score`` says."""
    command = ["data", "score", str(card), "--with", "mm.score.reference.ReferenceLM", "--model", str(reference)]
    result = CliRunner().invoke(app, [*command, "--folder", str(folder / "cache" / "index"), "--device", "cpu", *more])
    if result.exception is not None:
        raise result.exception
    return result.output


def recipe_of_captions(folder: Path, card: Path, tokenizer: Path, weights: dict[str, Any], **changes: Any) -> Path:
    """A run with an encoder over the captions with weights."""
    cards = {"captions": card, "text": card, "held_out": card}
    path = write_recipe(folder, cards, tokenizer, ["captions"], steps=4, run=str(folder / "run"))
    content = yaml.safe_load(path.read_text())
    content["data"]["sources"]["captions"]["weights"] = weights
    content["data"]["index"] = str(folder / "cache")
    content["model"]["encoders"].pop("speech"), content["model"]["encoders"].pop("point")
    path.write_text(yaml.safe_dump(content | changes))
    return path


class World:
    """A folder with scored captions.

    said: by the command that scored them
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.card, self.reference = folder / "captions.yaml", folder / "reference.yaml"

    @property
    def index(self) -> Index:
        return index_card(Card.load(self.card), "train", self.folder / "cache" / "index", progress=False)

    def column(self) -> list[list[dict[str, Any]]]:
        (fingerprint,) = columns.fingerprints(self.index, REFERENCE)
        return columns.load(self.index, REFERENCE, fingerprint).to_pylist()


@pytest.fixture(scope="module")
def world(session_folder: Path, tokenizer_folder: Path) -> World:
    def make(folder: Path) -> None:
        card = write_captions(folder)
        said = score(card, write_reference(folder, tokenizer_folder), folder, "folds=3")
        (folder / "said.txt").write_text(said)

    return World(once(session_folder / "reference", make), tokenizer_folder)


# --------------------------------------------------------------------------------------------------------- words alone


def test_words_have_the_ids_that_they_have_beside_media(tokenizer_folder: Path) -> None:
    options = TokenizerOptions(str(tokenizer_folder), around={"image": Around("<|im_start|>", " ")})
    whole, words = TextTokenizer.load(options), TextTokenizer.load(replace(options, words_only=True))
    assert isinstance(words, WordsOnly)
    assert words.beside_media == whole.fingerprint != words.fingerprint
    sample = Sample("", "", (Text("a c"), Image(b""), Text("at"), Codes(Modality.IMAGE, (1,))))
    kept = [piece for piece in whole.render(sample) if piece.part is None]
    assert words.render(sample)[1:] == kept
    assert words.render(sample)[0] == ((words.end,), False, None)
    chat = Sample("", "", (Text("a", role="user"), Image(b"", role="user"), Text("b", role="assistant")))
    assert words.render(chat) == [piece for piece in whole.render(chat) if piece.part is None]


def test_a_recipe_of_words_alone_plans_trains_and_shows_samples_with_pictures(world: World) -> None:
    run = world.folder / "reference" / "fold-0-of-3"
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    page = inspect_page(planned(Recipe.load(run / "recipe.yaml")), 0)
    assert "<img" not in page
    assert any(caption in page for caption in CAPTIONS)


# --------------------------------------------------------------------------------------------------------------- folds


def test_equal_words_share_a_fold_however_they_are_spaced() -> None:
    for folds in (2, 5):
        found = {fold_of(folds, Sample("", "", (Image(b"1"), Text(text)))) for text in ("A cat", "a  CAT ", "a\ncat")}
        assert len(found) == 1
    sizes = np.bincount([fold_of(4, Sample("", "", (Text(str(number)),))) for number in range(4000)])
    assert (np.abs(sizes - 1000) < 120).all()


def test_no_model_is_trained_on_what_it_scores_and_all_on_everything_else(world: World) -> None:
    texts = [
        "".join(part.text for part in world.index.sample(row).parts if isinstance(part, Text)) for row in range(24)
    ]
    for fold in range(3):
        data = planned(Recipe.load(world.folder / "reference" / f"fold-{fold}-of-3" / "recipe.yaml"))
        trained = {texts[row] for row in rows_of(data)}
        scored = {text for text in texts if fold_of(3, Sample("", "", (Text(text),))) == fold}
        assert trained == set(texts) - scored
        assert scored


def rows_of(data: Any) -> Iterator[int]:
    """Rows of the split that a plan trains on."""
    starts = data.sources[0].index.starts
    for number in range(data.plan.planned):
        for sample in data.plan.pack(number).samples():
            yield int(starts[sample.shard] + sample.row)


def test_the_column_holds_what_the_model_of_the_fold_says_of_each_word(world: World, tokenizer: TextTokenizer) -> None:
    """Against the model on one sample at a time, its own document written out by hand."""
    words = TextTokenizer.load(TokenizerOptions(str(world.tokenizer), words_only=True))
    column = world.column()
    for row in range(24):
        sample = world.index.sample(row)
        model = load_trained(world.folder / "reference" / f"fold-{fold_of(3, sample)}-of-3").model
        (text,) = [part.text for part in sample.parts if isinstance(part, Text)]
        ids = [tokenizer.end, *tokenizer.encode(text), tokenizer.end]
        processor = Processor(words, {})
        batch = processor.collate([[processor.document(sample)]], [[(0, 0, 0)]])
        assert batch.tokens.tolist() == ids
        with torch.no_grad():
            logits = model.hidden(batch) @ model.decoder.head_weight.T
        expected = logits.log_softmax(1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        (found,) = column[row]
        np.testing.assert_allclose(np.array(found["log_probabilities"], float), expected, rtol=2e-3)


def test_many_documents_are_scored_as_each_alone(world: World) -> None:
    words = TextTokenizer.load(TokenizerOptions(str(world.tokenizer), words_only=True))
    processor, model = Processor(words, {}), tiny_model([]).eval()
    documents = [processor.document(Sample("", "", (Text(caption),))) for caption in CAPTIONS]
    together = list(log_probabilities(model, processor, documents))
    alone = [next(log_probabilities(model, processor, [document])) for document in documents]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_says_what_it_wrote_and_repeated_writes_nothing(world: World) -> None:
    said = (world.folder / "said.txt").read_text()
    words = sum(len(caption) + 1 for caption in CAPTIONS) * 2
    assert f"captions/train: 24 samples, {words:,} words at " in said
    before = {path: path.stat().st_mtime_ns for path in (world.folder / "cache").rglob("*.parquet")}
    again = score(world.card, world.reference, world.folder, "folds=3")
    assert again.splitlines()[-1] == said.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in (world.folder / "cache").rglob("*.parquet")}


def test_another_split_is_scored_by_the_same_models(world: World) -> None:
    said = score(world.card, world.reference, world.folder, "folds=3", "--split", "half")
    assert "captions/half: 12 samples" in said
    index = index_card(Card.load(world.card), "half", world.folder / "cache" / "index", progress=False)
    fingerprint = columns.fingerprints(index, REFERENCE)[0]
    half = columns.load(index, REFERENCE, fingerprint).to_pylist()
    assert half == world.column()[:12]


def test_several_processes_write_the_same_column(world: World, tmp_path: Path) -> None:
    index = index_card(Card.load(world.card), "train", tmp_path / "cache" / "index", progress=False)
    scorer = ReferenceLM(str(world.folder / "reference" / "fold-0-of-3"))
    scorer.prepare(index)
    score_index(index, scorer, batch=4, processes=2, progress=False)
    apart = columns.load(index, REFERENCE, scorer.fingerprint).to_pylist()
    alone = list(scorer.values([lambda choice, row=row: index.sample(row, choice) for row in range(24)]))
    for one, other in zip(apart, alone, strict=True):
        np.testing.assert_allclose(one[0]["log_probabilities"], other[0]["log_probabilities"], rtol=2e-3)


def test_two_references_are_told_apart_by_name(world: World, tmp_path: Path) -> None:
    card = write_captions(tmp_path)
    runs = [world.folder / "reference" / f"fold-{fold}-of-3" for fold in range(2)]
    for run in runs:
        score(card, run, tmp_path)
    recipe = recipe_of_captions(tmp_path, card, world.tokenizer, PRIOR)
    with pytest.raises(ColumnError, match=r"could be 2 columns: .*, 1 folds; .*, 1 folds"):
        planned(Recipe.load(recipe))
    score(card, runs[1], tmp_path, "name=other")
    named = {"prior": {**PRIOR["prior"], "column": "other"}}
    recipe = recipe_of_captions(tmp_path, card, world.tokenizer, named)
    batch = planned(Recipe.load(recipe)).materialiser()[MicroStep(0, (0,))]
    assert batch.weights.unique().numel() > 10


def test_shards_that_are_indexed_in_training_find_their_columns(world: World) -> None:
    recipe = Recipe.load(recipe_of_captions(world.folder, world.card, world.tokenizer, PRIOR))
    whole = planned(recipe).materialiser()[MicroStep(0, (0,))]
    lazy = planned(replace(recipe, data=replace(recipe.data, lazy=True))).materialiser()
    lazy = pickle.loads(pickle.dumps(lazy))[MicroStep(0, (0,))]
    assert torch.equal(lazy.weights[lazy.weights > 0].sort().values, whole.weights[whole.weights > 0].sort().values)


def test_a_pretrained_model_from_elsewhere_scores_as_it_is(world: World, tmp_path: Path) -> None:
    pretrained = tiny_model([])
    save_decoder(pretrained.decoder, tmp_path / "published")
    model = {"decoder": {"pretrained": str(tmp_path / "published")}}
    reference = write_reference(tmp_path, world.tokenizer, model=model)
    scorer = ReferenceLM(str(reference), folds=1)
    scorer.prepare(world.index)
    assert not (tmp_path / "reference" / "fold-0-of-1").exists()  # nothing was trained
    (found,) = scorer.values([lambda choice: world.index.sample(0, choice)])
    assert found
    words = Processor(TextTokenizer.load(TokenizerOptions(str(world.tokenizer), words_only=True)), {})
    expected = next(log_probabilities(pretrained.eval(), words, [words.document(world.index.sample(0))]))
    np.testing.assert_allclose(found[0]["log_probabilities"], expected, rtol=2e-3)


def test_a_given_model_that_saw_the_samples_is_warned_of(world: World, caplog: pytest.LogCaptureFixture) -> None:
    scorer = ReferenceLM(str(world.folder / "reference" / "fold-0-of-3"))
    with caplog.at_level(logging.WARNING):
        scorer.prepare(world.index)
    assert "what it knows by heart has p near 1" in caplog.text


def test_mistakes_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"folds is 2; .* a trained model one"):
        ReferenceLM(str(world.folder / "reference" / "fold-0-of-3"), folds=2)
    with pytest.raises(RecipeError, match=r"it has no model\.decoder\.pretrained"):
        ReferenceLM(str(world.reference), folds=1).prepare(world.index)
    seeing = write_reference(tmp_path, world.tokenizer, model={"encoders": {"image": {}}})
    with pytest.raises(RecipeError, match=r"reads words alone; leave model.encoders out"):
        fold_recipe(str(seeing), world.index, "train", 2, 0)
    elsewhere = index_card(Card.load(world.card), "train", tmp_path / "somewhere", progress=False)
    with pytest.raises(RecipeError, match="with /index behind it"):
        fold_recipe(str(world.reference), elsewhere, "train", 2, 0)


# ------------------------------------------------------------------------------------------------------------ training


def test_training_takes_the_weights_of_the_column(world: World) -> None:
    recipe = recipe_of_captions(world.folder, world.card, world.tokenizer, PRIOR)
    data = planned(Recipe.load(recipe))
    batch = data.materialiser()[MicroStep(0, (0,))]
    starts, column = world.index.starts, world.column()
    document, labelled = batch.document_of_token(), batch.labels != IGNORE
    for number, (source, shard, row) in enumerate(batch.rows.tolist()):
        if source < 0:
            continue
        logs = np.array(column[starts[shard] + row][0]["log_probabilities"], np.float64)
        raw = 1 - np.exp(logs)
        weights = batch.weights[labelled & (document == number)].numpy()
        np.testing.assert_allclose(weights, raw * len(raw) / raw.sum(), rtol=1e-3)
        assert weights.sum() == pytest.approx(len(weights), rel=1e-5)


def test_alpha_0_trains_as_plain_next_token_prediction_to_the_bit(world: World, tmp_path: Path) -> None:
    found = []
    for name, weights in {
        "plain": {},
        "zero": {"prior": {**PRIOR["prior"], "alpha": 0}},
        "one": {"prior": {**PRIOR["prior"], "alpha": 1}},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        recipe = recipe_of_captions(folder, world.card, world.tokenizer, weights)
        run = train_here(recipe, f"data.index={world.folder / 'cache'}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["loss"], line["gradient_norm"]) for line in lines])
    plain, zero, one = found
    assert plain == zero
    assert plain != one
    assert all(math.isfinite(loss) for loss, _ in one)


def test_changed_words_are_noticed_and_never_shifted(world: World, tmp_path: Path) -> None:
    """Captions of the same lengths, in shards whose column was made for others and stamped as theirs."""
    swapped = [caption.replace("cats", "dogs") for caption in CAPTIONS]
    card = write_captions(tmp_path, swapped)
    index = index_card(Card.load(card), "train", tmp_path / "cache" / "index", progress=False)
    (fingerprint,) = columns.fingerprints(world.index, REFERENCE)[:1]
    made = iter(world.column())
    kind = ReferenceLM.type
    columns.compute(index, REFERENCE, fingerprint, lambda sample: fp16(next(made)), kind, progress=False)
    data = planned(Recipe.load(recipe_of_captions(tmp_path, card, world.tokenizer, PRIOR)))
    with pytest.raises(ColumnError, match=r"'reference' of .*captions-\d.tar, row \d+: computed for other words"):
        data.materialiser()[MicroStep(0, (0,))]


def fp16(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one | {"log_probabilities": np.array(one["log_probabilities"], np.float16)} for one in value]


def test_a_new_shard_needs_a_new_column(world: World, tmp_path: Path) -> None:
    card = write_captions(tmp_path)
    score(card, write_reference(tmp_path, world.tokenizer), tmp_path)
    recipe = recipe_of_captions(tmp_path, card, world.tokenizer, PRIOR)
    planned(Recipe.load(recipe))
    write_captions(tmp_path, [caption.upper() for caption in CAPTIONS])
    with pytest.raises(ColumnError, match="computed for other rows"):
        planned(Recipe.load(recipe))


def test_with_pictures_as_codes_only_words_are_weighed(world: World, tmp_path: Path) -> None:
    recipe = Recipe.load(fusion_recipe(tmp_path, world.tokenizer))
    run_tokenize(tmp_path / "recipe.yaml")
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (name, source), *_ = content["data"]["sources"].items()
    reference = write_reference(tmp_path, world.tokenizer)
    score(Path(source["card"]), reference, Path(recipe.data.index).parent, "--folder", f"{recipe.data.index}/index")
    content["data"]["sources"][name]["weights"] = {"prior": {**PRIOR["prior"], "alpha": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    batch = planned(Recipe.load(tmp_path / "recipe.yaml")).materialiser()[MicroStep(0, (0,))]
    labelled = batch.labels != IGNORE
    codes = labelled & (batch.labels >= 259)
    words = labelled & (batch.labels < 259)
    assert codes.sum() > 5
    assert (batch.weights[codes] == 1).all()
    assert batch.weights[words].unique().numel() > 10
    document = batch.document_of_token()
    for number in range(len(batch.rows)):
        of_document = words & (document == number)
        assert float(batch.weights[of_document].sum()) == pytest.approx(int(of_document.sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ the views


def test_the_inspector_colours_every_word_by_its_weight(world: World) -> None:
    data = planned(Recipe.load(recipe_of_captions(world.folder, world.card, world.tokenizer, PRIOR)))
    batch = data.materialiser()[MicroStep(0, (0,))]
    expected = [weight for weight in batch.weights.tolist() if weight]
    view = view_pack(data, 0)
    shown = [span.weight for span in view.spans for _ in range(span.tokens) if span.weight]
    assert shown == pytest.approx(expected)
    assert len(set(shown)) > 10
    page = inspect_page(data, 0)
    assert f"full colour is a weight of {max(span.weight for pack in pages(data) for span in pack.spans):.3g}" in page
    words = re.search(r'<span class="run">(.*?)</span></span>', page, re.DOTALL)
    assert words
    assert re.sub("<[^>]*>", "", words[1]) in CAPTIONS  # its letters stand together, whatever they weigh


def pages(data: Any) -> list[Any]:
    """The packs of the first step."""
    return [view_pack(data, number) for number in data.plan.batch(0) if number >= 0]


def test_the_report_tells_what_tokens_weighed(world: World, tmp_path: Path) -> None:
    run = train_here(
        recipe_of_captions(tmp_path, world.card, world.tokenizer, PRIOR), f"data.index={world.folder / 'cache'}"
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean, square = (sum(line[f"weights/{name}"] for line in lines) / len(lines) for name in ("mean", "square"))
    page = report_of_run(run).replace("\u202f", " ")
    assert f"is as exact as one of {100 * mean**2 / square:.1f} % of the tokens" in page
    for name in ("0.5 to 1", "1 to 2"):
        share = sum(line[f"weights/tokens/{name}"] for line in lines) / len(lines)
        ends = f"{lines[0][f'weights/loss/{name}']:.3f} → {lines[-1][f'weights/loss/{name}']:.3f}"
        assert re.search(rf"{name}</th><td>.*?{100 * share:.1f} %</td><td>{ends}</td>", page)
    assert "from 8" not in page


def test_a_run_of_equal_weights_tells_nothing_of_them(world: World) -> None:
    run = world.folder / "reference" / "fold-0-of-3"
    assert "What tokens weigh" not in report_of_run(run)
    assert "weights/" not in (run / "metrics.jsonl").read_text()
