"""The sums that meters take from an objective, against a loop over the tokens, and weights of modalities by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm.configure import RecipeError, build
from mm.model.multimodal import DecoderOptions, ModelOptions, MultimodalLM, build_model
from mm.objectives.next_token import NextToken, weighted_sums
from mm.packing.batch import IGNORE, Batch
from mm.packing.collate import Processor, Spelling
from mm.packing.materialise import MicroStep
from mm.sample import Codes, Modality, Sample, Text
from mm.tokenizers.text import TextTokenizer
from mm.tokenizers.vocabulary import Vocabulary
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.patch_colours import Patches
from tests.small_world import DECODER


def test_losses_are_summed_by_source_and_by_the_modality_of_the_label(recipe: Path) -> None:
    data = planned(Recipe.load(recipe))
    batch = data.materialiser()[MicroStep(0, (0, 1, 2, 3, -1))]
    labelled = [token for token, label in enumerate(batch.labels.tolist()) if label != IGNORE]
    nll = torch.rand(len(labelled), generator=torch.Generator().manual_seed(0))
    document, expected = batch.document_of_token(), defaultdict(lambda: [0.0, 0.0])
    for token, loss in zip(labelled, nll.tolist(), strict=True):
        weight, row = float(batch.weights[token]), batch.rows[document[token]]
        kind = Modality(int(batch.modality[token + 1]))
        for name in ("total", f"modality/{kind.label}", f"source/{data.names[int(row[0])]}"):
            expected[name][0] += weight * loss
            expected[name][1] += weight
    found = {name: [float(value) for value in pair] for name, pair in weighted_sums(batch, nll, data.names).items()}
    assert len(expected) > 4
    for name, pair in found.items():
        assert pair == pytest.approx(expected[name], rel=1e-6), name


# ------------------------------------------------------------------------------------------------ weights of modalities


def labelled_batch(tokenizer: TextTokenizer) -> Batch:
    """Documents with words, and codes of pictures and recordings, all with loss."""
    book = Vocabulary.of(tokenizer.vocabulary, {Modality.IMAGE: 16, Modality.SPEECH: 8}).codebooks
    processor = Processor(tokenizer, {kind: Spelling(Patches(), one, "") for kind, one in book.items()})
    samples = [
        Sample("", "", (Codes(Modality.IMAGE, (1, 2, 3)), Text("three"))),
        Sample("", "", (Text("two"), Codes(Modality.SPEECH, (1, 2)), Codes(Modality.IMAGE, (4,)))),
    ]
    documents = [processor.document(one) for one in samples]
    return processor.collate([documents], [[(0, 0, row) for row in range(2)]])


def gradients(objective: NextToken, model: MultimodalLM, batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    denominators = objective.weights(batches)
    model.zero_grad()
    losses = [objective.loss(model, batch, denominators, ["test"])[0] for batch in batches]
    total = torch.stack(losses).sum()
    total.backward()
    return float(total.detach()), [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    torch.manual_seed(0)
    return build_model(ModelOptions(DecoderOptions(config=DECODER | {"vocabulary": 400}))).double()


def test_weights_of_modalities_multiply_those_of_the_labels_by_hand(
    tokenizer: TextTokenizer, model: MultimodalLM
) -> None:
    batch = labelled_batch(tokenizer)
    factors = {Modality.TEXT: 1.0, Modality.IMAGE: 0.5, Modality.SPEECH: 3.0}
    by_hand = batch.weights.clone()
    for token, label in enumerate(batch.labels.tolist()):
        if label != IGNORE:
            by_hand[token] *= factors[Modality(int(batch.modality[token + 1]))]
    weighted = gradients(NextToken(modality_weights={"image": 0.5, "speech": 3.0}), model, [batch])
    expected = gradients(NextToken(), model, [replace(batch, weights=by_hand)])
    assert weighted[0] == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(weighted[1], expected[1], strict=True))


def test_a_modality_of_weight_0_is_in_neither_the_loss_nor_its_normaliser(
    tokenizer: TextTokenizer, model: MultimodalLM
) -> None:
    batch = labelled_batch(tokenizer)
    codes = (batch.modality.roll(-1) != Modality.TEXT) & (batch.labels != IGNORE)
    without = replace(batch, labels=batch.labels.where(~codes, IGNORE), weights=batch.weights.where(~codes, 0))
    objective = NextToken(modality_weights={"image": 0, "speech": 0})
    assert objective.weights([batch]) == NextToken().weights([without])
    one, other = gradients(objective, model, [batch]), gradients(NextToken(), model, [without])
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)
    _, sums = objective.loss(model, batch, objective.weights([batch]), ["test"])
    assert [float(value) for value in sums["modality/image"]] == [0, 0]


def test_a_batch_with_labels_of_a_modality_of_weight_0_only_has_nothing_to_learn_from(tokenizer: TextTokenizer) -> None:
    """A step without weight is skipped: its weights are not to decay either."""
    batch = labelled_batch(tokenizer)
    only_text = replace(batch, weights=batch.weights * (batch.modality.roll(-1) == Modality.TEXT))
    objective = NextToken(modality_weights={"text": 0.0}, normalise="by_modality")
    assert any(objective.weights([batch]).values())
    assert not any(objective.weights([only_text]).values())


def test_a_share_of_smoothing_that_leaves_nothing_to_the_label_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"label_smoothing is 1\.0; expected a share from 0 to below 1"):
        NextToken(label_smoothing=1.0)


def test_smoothing_is_over_words_and_codes_and_not_over_rows_that_fill_up_the_head(
    tokenizer: TextTokenizer, model: MultimodalLM
) -> None:
    """What the head says of rows behind the last id has no part in the target."""
    objective, batch = NextToken(label_smoothing=0.3), labelled_batch(tokenizer)
    book = Vocabulary.of(tokenizer.vocabulary, {Modality.IMAGE: 16, Modality.SPEECH: 8})
    processor = Processor(tokenizer, {kind: Spelling(Patches(), one, "") for kind, one in book.codebooks.items()})
    objective.prepare(model, processor, torch.device("cpu"))
    assert model.ids == book.size == 259 + 18 + 10
    labelled = batch.labels != IGNORE
    logits = (model.hidden(batch) @ model.decoder.head_weight.T)[labelled]
    target = 0.7 * torch.nn.functional.one_hot(batch.labels[labelled], 400).double()
    target[:, : book.size] += 0.3 / book.size
    expected = torch.nn.functional.cross_entropy(logits, target)
    found, _ = objective.loss(model, batch, objective.weights([batch]), ["test"])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    model.ids = None


def test_without_weights_of_modalities_the_batch_is_taken_as_it_is(tokenizer: TextTokenizer) -> None:
    batch = labelled_batch(tokenizer)
    assert NextToken()._weighted(batch) is batch


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"pictures": 1.0}, "expected text, image, speech, point"), ({"image": -1.0}, "a number from 0 to")],
)
def test_an_unknown_modality_or_a_weight_below_0_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({"_target_": "mm.objectives.next_token.NextToken", "modality_weights": weights}, NextToken)
