"""Loss weights of tokens: each factor against its formula, their product in the batch, and columns that do not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.configure import RecipeError
from mm.data import columns
from mm.data.columns import ColumnError
from mm.packing.batch import IGNORE
from mm.packing.collate import Document, Processor, Spelling
from mm.packing.materialise import MicroStep
from mm.packing.weights import (
    Column,
    Factor,
    InversePrior,
    Keep,
    Length,
    Modalities,
    Prior,
    PriorTable,
    Scale,
    aligned,
    digest,
    reference_fingerprint,
    reference_type,
    targets,
    words_with_loss,
)
from mm.sample import Codes, Modality, Sample, Text
from mm.tokenizers.text import TextTokenizer
from mm.tokenizers.vocabulary import Vocabulary
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.patch_colours import Patches

WEIGHTS = "mm.packing.weights."


def words(count: int) -> Document:
    """A document of so many words, a media slot before them."""
    weights = np.ones(count + 1, np.float32)
    weights[0] = 0
    return Document(np.arange(count + 1), weights, np.zeros(count + 1, np.int8), ())


def factors(factor: Factor, log_probabilities: Sequence[float]) -> np.ndarray:
    """Of the words of a document."""
    document = words(len(log_probabilities))
    found = factor.of(document, np.array([np.nan, *log_probabilities]))
    return np.broadcast_to(found, len(document))[1:]


LOGS = st.lists(st.floats(-60, 0, width=16), min_size=1, max_size=30)


# ------------------------------------------------------------------------------------------------------------- formulas


@settings(deadline=None)
@given(LOGS, st.floats(0.1, 3))
def test_prior_is_the_formula_of_the_paper_within_each_caption(logs: list[float], alpha: float) -> None:
    raw = [(1 - math.exp(log)) ** alpha for log in logs]
    total = math.fsum(raw)
    expected = [len(raw) * one / total for one in raw] if total else raw
    np.testing.assert_allclose(factors(Prior(alpha=alpha), logs), expected, rtol=1e-6, atol=1e-9)


@settings(deadline=None)
@given(LOGS)
def test_weights_of_a_caption_add_up_to_its_words_or_to_nothing_where_it_is_known_by_heart(logs: list[float]) -> None:
    for factor in (Prior(), Prior(alpha=2), InversePrior(), PriorTable(edges=(0.5,), weights=(2.0, 0.0))):
        total = factors(factor, logs).sum()
        assert total == pytest.approx(len(logs)) or total == 0
    assert factors(Prior(), [0.0, 0.0]).tolist() == [0, 0]


@settings(deadline=None)
@given(LOGS)
def test_with_alpha_0_every_weight_is_1_to_the_bit(logs: list[float]) -> None:
    for factor in (Prior(alpha=0), InversePrior(alpha=0), Prior(alpha=0, normalise="batch")):
        assert factors(factor, logs).tolist() == [1.0] * len(logs)


@settings(deadline=None)
@given(LOGS, st.floats(0.1, 2), st.floats(1, 50))
def test_the_inverse_prior_is_capped_and_left_as_it_is_for_the_global_batch(
    logs: list[float], alpha: float, w_max: float
) -> None:
    expected = [min(math.exp(-alpha * log), w_max) for log in logs]
    np.testing.assert_allclose(factors(InversePrior("batch", alpha=alpha, w_max=w_max), logs), expected, rtol=1e-9)


def test_a_table_gives_each_range_of_probabilities_its_weight() -> None:
    table = PriorTable("batch", edges=(0.1, 0.5), weights=(3, 2, 1))
    logs = np.log([0.05, 0.1, 0.4999, 0.5, 1.0])
    assert factors(table, logs.tolist()).tolist() == [3, 2, 2, 1, 1]


@pytest.mark.parametrize(("order", "kept"), [("lowest", [0, 1, 1, 0, 0]), ("highest", [1, 0, 0, 1, 0])])
def test_selection_keeps_a_share_of_the_words_rounded_up(order: Any, kept: list[int]) -> None:
    assert factors(Keep(0.3, order=order), [-1, -5, -3, -1, -2]).tolist() == kept


@pytest.mark.parametrize(("balance", "total"), [("token", 9.0), ("square", 3.0), ("sample", 1.0)])
def test_length_balance_sets_what_a_sample_weighs_in_all(balance: Any, total: float) -> None:
    document = words(9)
    assert Length(balance).of(document, np.empty(0)) * targets(document).sum() == pytest.approx(total)


def test_modalities_and_sources_have_a_factor_each() -> None:
    document = Document(np.arange(3), np.ones(3, np.float32), np.array([0, 1, 2], np.int8), ())
    assert Modalities({"image": 0.5}).of(document, np.empty(0)).tolist() == [1, 0.5, 1]
    assert Scale(3).of(document, np.empty(0)) == 3


@pytest.mark.parametrize(
    ("factor", "options", "message"),
    [
        (Scale, {"weight": -1}, "weight is -1; expected a number from 0 to 1,000,000"),
        (Prior, {"alpha": math.inf}, "alpha is inf"),
        (Keep, {"share": 0}, "above 0 and up to 1"),
        (Modalities, {"weights": {"pictures": 1}}, "expected text, image, speech, point"),
        (PriorTable, {"edges": (0.5, 0.1), "weights": (1, 2, 3)}, "a table of 2 ascending edges has 3 weights"),
    ],
)
def test_mistakes_in_options_are_named(factor: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        factor(**options)


# ----------------------------------------------------------------------------------------------- words and their values


@pytest.fixture(scope="module")
def fused(tokenizer: TextTokenizer) -> Document:
    """Codes, words and codes, all with loss: image codes 1 2 3, "ab", image code 4, the end."""
    book = Vocabulary.of(tokenizer.vocabulary, {Modality.IMAGE: 16}).codebooks[Modality.IMAGE]
    processor = Processor(tokenizer, {Modality.IMAGE: Spelling(Patches(), book, "")})
    image = Modality.IMAGE
    return processor.document(Sample("", "", (Codes(image, (1, 2, 3)), Text("ab"), Codes(image, (4,)))))


def test_only_words_and_the_end_have_a_reference_and_codes_with_their_ends_weigh_1(fused: Document) -> None:
    assert words_with_loss(fused).tolist() == [False] * 5 + [True] * 2 + [False] * 3 + [True]
    values = aligned(pa.scalar([-1.0, -2.0, -3.0]), fused, 0)
    found = Prior(alpha=1).of(fused, values)
    assert found[:5].tolist() == [1] * 5
    assert found[7:10].tolist() == [1] * 3
    assert found[words_with_loss(fused)].sum() == pytest.approx(3)


def stored(*of_choices: tuple[int, list[float]]) -> pa.Scalar:
    value = [{"ids": ids, "log_probabilities": np.array(logs, np.float16)} for ids, logs in of_choices]
    return pa.array([value], reference_type())[0]


def test_values_go_to_the_words_of_the_choice_that_was_drawn(fused: Document) -> None:
    mine = digest(fused.tokens[words_with_loss(fused)])
    values = aligned(stored((5, [-9.0]), (mine, [-1.0, -2.0, -3.0])), fused, 1)
    assert values[words_with_loss(fused)].tolist() == [-1, -2, -3]
    assert np.isnan(values[~words_with_loss(fused)]).all()
    assert aligned(pa.scalar(0.5), fused, 0).tolist() == [0.5] * len(fused)
    assert aligned(pa.scalar(0.5, pa.float16()), fused, 0).tolist() == [0.5] * len(fused)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pa.scalar([1.0, 2.0]), "2 values, and the sample has 3 words with loss"),
        (pa.scalar([[1.0, 2.0, 3.0]]), "1 choices of text, and choice 1 is asked for"),
        (stored((0, []), (7, [-1.0, -2.0, -3.0])), "computed for other words"),
        (pa.scalar(None, pa.float32()), "the value is None"),
        (pa.scalar("heavy"), "the value is 'heavy'"),
        (pa.scalar([1.0, None, 3.0]), "1 of 3 values are null"),
    ],
)
def test_values_that_do_not_belong_to_the_words_are_an_error(fused: Document, value: pa.Scalar, message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        aligned(value, fused, 1)


def test_weights_of_a_column_that_are_none_are_an_error(fused: Document) -> None:
    with pytest.raises(ColumnError, match="below 0 or that are not finite"):
        Column("mine").of(fused, np.full(len(fused), -1.0))


# ------------------------------------------------------------------------------------------------- from recipe to batch


def weighted_recipe(recipe: Path, folder: Path, weights: dict[str, Any], source: str = "text") -> Recipe:
    """The recipe of a small run over one source with weights, with an index of its own."""
    content = yaml.safe_load(recipe.read_text())
    content["data"]["sources"] = {source: content["data"]["sources"][source] | {"weights": weights}}
    content |= {"run": str(folder / "run"), "steps": 2}
    content["data"]["index"] = str(folder / "cache")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return Recipe.load(path)


def count(sample: Sample) -> float:
    """A number for a sample: how long its words are."""
    return float(sum(len(part.text) for part in sample.parts if isinstance(part, Text)))


def write_column(recipe: Recipe, name: str, function: Any, kind: pa.DataType, fingerprint: str = "made up") -> None:
    """A column of a user over the rows of the only source."""
    (source,) = planned(weightless(recipe)).sources
    assert source.index is not None
    columns.compute(source.index, name, fingerprint, function, kind, progress=False)


def weightless(recipe: Recipe) -> Recipe:
    """The recipe without the weights of its sources."""
    sources = {name: replace(options, weights={}) for name, options in recipe.data.sources.items()}
    return replace(recipe, data=replace(recipe.data, sources=sources))


def test_factors_multiply_in_the_batch_beside_the_labels(recipe: Path, tmp_path: Path) -> None:
    specs = {
        "twice": {"_target_": f"{WEIGHTS}Scale", "weight": 2},
        "length": {"_target_": f"{WEIGHTS}Length", "balance": "square"},
    }
    batch = planned(weighted_recipe(recipe, tmp_path, specs)).materialiser()[MicroStep(0, (0, 1))]
    document, labelled = batch.document_of_token(), batch.labels != IGNORE
    for number in range(len(batch.rows)):
        weights = batch.weights[labelled & (document == number)]
        torch.testing.assert_close(weights, torch.full_like(weights, 2 * max(1, len(weights)) ** -0.5))
    assert (batch.weights[~labelled] == 0).all()


def test_a_target_of_weight_0_keeps_its_label(recipe: Path, tmp_path: Path) -> None:
    nothing = {"none": {"_target_": f"{WEIGHTS}Scale", "weight": 1e-46}}  # 0 in float32; 0 itself leaves no sample
    batch = planned(weighted_recipe(recipe, tmp_path, nothing)).materialiser()[MicroStep(0, (0,))]
    assert (batch.labels != IGNORE).sum() > 20
    assert (batch.weights == 0).all()


def test_a_users_column_weighs_the_samples_it_was_computed_for(recipe: Path, tmp_path: Path) -> None:
    loaded = weighted_recipe(recipe, tmp_path, {"mine": {"_target_": f"{WEIGHTS}Column", "column": "characters"}})
    with pytest.raises(ColumnError, match="column 'characters' of text/train was not computed"):
        planned(loaded)
    write_column(loaded, "characters", count, pa.float32())
    data = planned(loaded)
    batch = data.materialiser()[MicroStep(0, (0,))]
    document, labelled = batch.document_of_token(), batch.labels != IGNORE
    for number, (source, shard, row) in enumerate(batch.rows.tolist()):
        if source >= 0:
            expected = count(data.samples[0].sample(shard, row, 0, 0))
            assert set(batch.weights[labelled & (document == number)].tolist()) == {expected}


def test_a_reference_of_another_tokenizer_is_refused(recipe: Path, tmp_path: Path) -> None:
    loaded = weighted_recipe(recipe, tmp_path, {"prior": {"_target_": f"{WEIGHTS}Prior"}})
    write_column(loaded, "reference", lambda sample: None, reference_type(), reference_fingerprint("another", "model"))
    with pytest.raises(ColumnError, match=r"belongs to other tokenizers.*tokenizer another, model.*mm data score"):
        planned(loaded)


def test_two_columns_of_one_name_are_told_apart_by_their_owner(recipe: Path, tmp_path: Path) -> None:
    loaded = weighted_recipe(recipe, tmp_path, {"mine": {"_target_": f"{WEIGHTS}Column", "column": "characters"}})
    for fingerprint in ("one", "two"):
        write_column(loaded, "characters", count, pa.float32(), fingerprint)
    with pytest.raises(ColumnError, match="could be 2 columns: one; two"):
        planned(loaded)


def test_an_unknown_factor_is_named_with_its_source(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"source text, weights.prior: .*has no 'Priors'"):
        planned(weighted_recipe(recipe, tmp_path, {"prior": {"_target_": f"{WEIGHTS}Priors"}}))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_cutting_a_document_cuts_its_factors(length: int, cut: int) -> None:
    document = words(length)
    weighed = replace(document, factors=np.arange(length + 1, dtype=np.float32))
    kept = weighed.cut(min(cut, length))
    assert kept.loss_weights.tolist() == weighed.loss_weights[: len(kept)].tolist()
