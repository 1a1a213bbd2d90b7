"""Bidirectional attention inside pictures and sounds: they see all of themselves, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mm.configure import RecipeError
from mm.layers.attention import BACKENDS, attend
from mm.layers.layout import Layout
from mm.model.generate import KeyValueCache, passages
from mm.model.multimodal import DecoderOptions, ModelOptions, MultimodalLM, build_model
from mm.packing.collate import Document, Processor
from mm.sample import Image, Sample, Speech, Text
from mm.tokenizers.text import TextTokenizer
from tests.small_world import losses, picture, recording, tiny_model, train_here, train_together, words
from tests.test_attention import UNFUSED, heads, plain_attention
from tests.test_guarantees import assert_same, collate, step

pytestmark = pytest.mark.usefixtures("one_thread")

SPANS = [0, 1, 1, 1, 0, 2, 2, 0, 1, 1, 0, 0, 0, 0]
LENGTHS = [8, 5, 1]


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer, model: MultimodalLM) -> Processor:
    return Processor(tokenizer, model.entrances)


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    made = tiny_model().double()
    made.decoder.config = replace(made.decoder.config, media_attention="bidirectional")
    return made


def document(processor: Processor, *parts: Text | Image | Speech) -> Document:
    return processor.document(Sample("test", "a sample", parts))


def visible() -> Tensor:
    """(T, T) bool, by the words of `Layout.spans`."""
    documents = Layout.of(LENGTHS).document_of_token.tolist()
    tokens = list(zip(range(len(SPANS)), documents, SPANS, strict=True))

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        (q, its_document, its_span), (k, document, span) = query, key
        return document == its_document and (k <= q or its_span == span != 0)

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


@UNFUSED
@pytest.mark.parametrize("backend", ["masked", "flex"])
def test_tokens_of_a_span_see_all_of_it(backend: str) -> None:
    layout = Layout.of(LENGTHS, spans=torch.tensor(SPANS, dtype=torch.int32))
    inputs = heads(layout.tokens)
    found = BACKENDS[backend].run(*inputs, layout)  # directly: flex is offered on CUDA only
    torch.testing.assert_close(found, plain_attention(*inputs, visible()), rtol=1e-10, atol=1e-12)


def test_spans_have_the_gradients_of_the_formula() -> None:
    layout = Layout.of(LENGTHS, spans=torch.tensor(SPANS, dtype=torch.int32))
    inputs = heads(layout.tokens, gradient=True)
    upstream = torch.randn(layout.tokens, *inputs[0].shape[1:], dtype=torch.float64)
    outputs = attend(*inputs, layout), plain_attention(*inputs, visible())
    found, expected = (torch.autograd.grad(output, inputs, upstream) for output in outputs)
    for of_found, of_expected in zip(found, expected, strict=True):
        torch.testing.assert_close(of_found, of_expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["buckets", "documents"])
def test_a_backend_that_would_ignore_spans_is_refused(backend: str) -> None:
    layout = Layout.of([4], spans=torch.tensor([0, 1, 1, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match=f"{backend!r} does not take .* with spans; these do: masked$"):
        attend(*heads(4), layout, backend)


def test_spans_are_the_slots_of_every_item_and_bear_no_label(processor: Processor, model: MultimodalLM) -> None:
    pack = [
        document(processor, Text(words(1)), Image(picture(1)), Image(picture(2)), Text(words(2))),
        document(processor, Speech(recording(3)), Text(words(3))),
        document(processor, Text(words(4))),
    ]
    batch = collate(processor, [pack])
    spans = model.spans(batch)
    assert spans is not None
    inside = torch.cat([media.slots for media in batch.media.values()]).sort().values
    assert torch.equal(spans.nonzero().squeeze(1), inside)
    runs = spans[spans > 0].unique_consecutive()
    assert len(runs) == len(set(runs.tolist())) == 3
    predicted_inside = (spans[:-1] > 0) & (spans[:-1] == spans[1:]) & (batch.labels[:-1] != -100)
    assert not predicted_inside.any()


def test_a_token_of_a_picture_depends_on_what_follows_in_it_and_on_nothing_later(
    processor: Processor, model: MultimodalLM
) -> None:
    batch = collate(processor, [[document(processor, Text(words(1)), Image(picture(1)), Text(words(2)))]])
    embeddings = model.embed(batch).detach()
    slots = next(iter(batch.media.values())).slots
    first, last = int(slots[0]), int(slots[-1])

    def changed_by(place: int) -> list[int]:
        other = embeddings.clone()
        other[place] += 1.0
        layout = model.layout(batch)
        one, two = (model.decoder(x, batch.positions, layout) for x in (embeddings, other))
        return (one != two).any(1).nonzero().squeeze(1).tolist()

    assert changed_by(last) == list(range(first, len(batch.tokens)))
    assert changed_by(last + 1) == list(range(last + 1, len(batch.tokens)))
    assert changed_by(first - 1) == list(range(first - 1, len(batch.tokens)))


def test_packs_give_the_same_gradients_together_and_alone(processor: Processor, model: MultimodalLM) -> None:
    pack = [
        document(processor, Text(words(1)), Image(picture(1)), Text(words(2))),
        document(processor, Image(picture(2)), Image(picture(3)), Text(words(3))),
        document(processor, Speech(recording(3)), Text(words(4))),
    ]
    together = step(model, [collate(processor, [pack])])
    assert_same(together, step(model, [collate(processor, [[one]]) for one in pack]), 1e-10)


def test_reading_on_from_a_cache_gives_what_reading_at_once_gives(processor: Processor, model: MultimodalLM) -> None:
    batch = collate(processor, [[document(processor, Text("a"), Image(picture(1)), Text(words(2)))]])
    (whole,) = passages(model, batch)
    assert whole.spans is not None
    read = int(whole.spans.nonzero().max()) + 1
    at_once = model.decoder(whole.embeddings, batch.positions, whole.layout(model.decoder, [len(whole)]))
    cache = KeyValueCache(model.decoder, 1, len(whole))
    beginning = replace(whole, **{name: getattr(whole, name)[:read] for name in vars(whole)})
    layout = beginning.layout(model.decoder, [read])
    model.decoder(beginning.embeddings, cache.positions(layout), layout, cache)
    cache.advance(layout)
    for place in range(read, len(whole)):
        layout = Layout.of([1])
        found = model.decoder(whole.embeddings[place : place + 1], cache.positions(layout), layout, cache)
        cache.advance(layout)
        torch.testing.assert_close(found[0], at_once[place], rtol=1e-9, atol=1e-10)


def test_it_trains_sharded_as_it_does_alone(recipe: Path, tmp_path: Path) -> None:
    plain = yaml.safe_load(recipe.read_text())
    plain["model"]["decoder"]["config"]["media_attention"] = "bidirectional"
    written = tmp_path / "recipe.yaml"
    written.write_text(yaml.safe_dump(plain, sort_keys=False))
    alone = losses(train_here(written, f"run={tmp_path / 'alone'}", "steps=3"))
    train_together(tmp_path, 2, [[str(written), f"run={tmp_path / 'two'}", "steps=3"]])
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-6)
    assert alone != pytest.approx(losses(train_here(recipe, f"run={tmp_path / 'causal'}", "steps=3")), rel=1e-6)


def test_a_model_without_encoders_has_no_use_for_it() -> None:
    sizes = {"vocabulary": 8, "width": 4, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4, "ffn": 4}
    options = ModelOptions(DecoderOptions(config=sizes | {"media_attention": "bidirectional"}))
    with pytest.raises(RecipeError, match="has no encoders, whose tokens it is for"):
        build_model(options)
