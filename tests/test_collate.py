"""Documents laid out by hand against what `collate` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from mm.encoders.adapters import MLP
from mm.encoders.base import Grid, Transform
from mm.packing.batch import IGNORE, Batch, Media
from mm.packing.collate import Document, Entrance, Item, LengthMismatch, Processor, UnusableDocument
from mm.sample import Modality
from mm.tokenizers.text import TextTokenizer


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Processor:
    return Processor(tokenizer, {})


def document(tokens: Sequence[int], weights: Sequence[float]) -> Document:
    return Document(np.array(tokens), np.array(weights, np.float32), np.zeros(len(tokens), np.int8), ())


FIRST = document([11, 12, 13], [0, 1, 2])
SECOND = document([21, 22], [1, 1])
THIRD = document([31, 32, 33, 34], [0, 0, 0.5, 0])
ROWS = [[(0, 2, 5), (1, 0, 7)], [(0, 1, 9)]]


def test_positions_start_at_zero_in_every_document(processor: Processor) -> None:
    batch = processor.collate([[FIRST, SECOND], [THIRD]], ROWS)
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]


def test_a_label_is_the_next_token_of_the_same_document_with_that_tokens_weight(processor: Processor) -> None:
    batch = processor.collate([[FIRST, SECOND], [THIRD]], ROWS)
    none = IGNORE
    assert batch.labels.tolist() == [12, 13, none, 22, none, none, 33, none, none]
    assert batch.weights.tolist() == [1, 2, 0, 1, 0, 0, 0.5, 0, 0]


def test_offsets_packs_and_rows_say_where_documents_and_packs_begin(processor: Processor) -> None:
    batch = processor.collate([[FIRST, SECOND], [THIRD]], ROWS)
    assert batch.offsets.tolist() == [0, 3, 5, 9]
    assert batch.packs.tolist() == [0, 5, 9]
    assert batch.rows.tolist() == [[0, 2, 5], [1, 0, 7], [0, 1, 9]]
    assert batch.real_tokens == 9


def test_packs_are_filled_up_to_a_fixed_capacity_by_documents_without_loss(processor: Processor) -> None:
    batch = processor.collate([[FIRST, SECOND], [THIRD]], ROWS, capacity=6)
    assert batch.packs.tolist() == [0, 6, 12]
    assert batch.offsets.tolist() == [0, 3, 5, 6, 10, 12]
    assert batch.rows[[2, 4]].tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert batch.real_tokens == 9
    assert batch.weights.sum() == processor.collate([[FIRST, SECOND], [THIRD]], ROWS).weights.sum()


def test_an_empty_pack_is_one_token_without_loss_so_that_its_rank_takes_part(processor: Processor) -> None:
    batch = processor.collate([[]], [[]])
    assert len(batch.tokens) == 1
    assert torch.equal(batch.labels, torch.tensor([IGNORE]))
    assert batch.real_tokens == 0


def test_a_pack_over_its_capacity_is_an_error_that_names_both_counts(processor: Processor) -> None:
    with pytest.raises(LengthMismatch, match=r"5 tokens.*capacity of 4"):
        processor.collate([[FIRST, SECOND]], [ROWS[0]], capacity=4)


class Numbered(Transform):
    """Items that are their own number."""

    modality: ClassVar[Modality] = Modality.IMAGE

    def grid(self, facts: Any) -> Grid:
        raise NotImplementedError

    def prepare(self, item: Any) -> Tensor:
        raise NotImplementedError

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"numbers": torch.stack(list(prepared))}

    def dummy(self) -> tuple[Tensor, Grid]:
        raise NotImplementedError


@st.composite
def some_documents(draw: st.DrawFn) -> Document:
    """Runs of words and items in any order: an item first, last, next to another, or alone."""
    tokens: list[int] = []
    weights: list[float] = []
    modality: list[int] = []
    items = []
    for is_item, length in draw(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=4)):
        if is_item:
            number = torch.tensor(draw(st.integers(0, 999)))
            items.append(Item(Modality.IMAGE, number, (length,), len(tokens), length))
        for _ in range(length):
            tokens.append(0 if is_item else draw(st.integers(1, 99)))
            weights.append(0.0 if is_item else draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])))
            modality.append(Modality.IMAGE if is_item else Modality.TEXT)
    columns = np.array(tokens), np.array(weights, np.float32), np.array(modality, np.int8)
    factors = draw(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 3.0])))
    return Document(*columns, tuple(items), None if factors is None else np.full(len(tokens), factors, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    packs=st.lists(st.lists(some_documents(), max_size=4), min_size=1, max_size=3),
    spare=st.one_of(st.none(), st.integers(0, 3)),
)
def test_any_documents_come_out_as_when_they_are_written_one_by_one(
    tokenizer: TextTokenizer, packs: list[list[Document]], spare: int | None
) -> None:
    processor = Processor(tokenizer, {Modality.IMAGE: Entrance(Numbered(), MLP(4, 4))})
    rows = [[(0, number, place) for place, _ in enumerate(pack)] for number, pack in enumerate(packs)]
    longest = max(max(sum(map(len, pack)), 1) for pack in packs)
    capacity = None if spare is None else longest + spare
    batch = processor.collate(packs, rows, capacity=capacity)
    assert_as_written(batch, packs, tokenizer.pad, capacity)


def assert_as_written(batch: Batch, packs: list[list[Document]], pad: int, capacity: int | None) -> None:
    tokens, positions, labels, weights, modality, starts = [], [], [], [], [], [0]
    lengths, numbers, slots, owners = [], [], [], []
    for pack in packs:
        padding = (capacity if capacity is not None else max(1, sum(map(len, pack)))) - sum(map(len, pack))
        for document in [*pack, *([None] if padding else [])]:
            size = padding if document is None else len(document)
            for place in range(size):
                tokens.append(pad if document is None else int(document.tokens[place]))
                positions.append(place)
                modality.append(-1 if document is None else int(document.modality[place]))
                bears = document is not None and place + 1 < size and document.weights[place + 1] > 0
                labels.append(int(document.tokens[place + 1]) if document is not None and bears else IGNORE)
                weights.append(float(document.loss_weights[place + 1]) if document is not None and bears else 0.0)
            for item in () if document is None else document.items:
                assert isinstance(item, Item)
                numbers.append(int(item.prepared))
                slots += [sum(lengths) + item.start + step for step in range(item.length)]
                owners.append(len(lengths))
            lengths.append(size)
        starts.append(sum(lengths))
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.labels.tolist() == labels
    assert batch.weights.tolist() == weights
    assert batch.modality.tolist() == modality
    assert batch.offsets.tolist() == [0, *accumulate(lengths)]
    assert batch.packs.tolist() == starts
    assert (Modality.IMAGE in batch.media) == bool(numbers)
    if numbers:
        media = batch.media[Modality.IMAGE]
        assert media.inputs["numbers"].tolist() == numbers
        assert media.slots.tolist() == slots
        assert media.documents.tolist() == owners


EMPTY = document([], [])
PICTURE = Item(Modality.IMAGE, torch.tensor(0), (2,), 1, 2)


@pytest.mark.parametrize("pack", [[EMPTY], [EMPTY, FIRST], [FIRST, EMPTY], [FIRST, EMPTY, SECOND]])
def test_a_document_without_tokens_is_refused_by_its_place_in_the_data(
    processor: Processor, pack: list[Document]
) -> None:
    """First in a batch it took the last label of the last document, and last it ended in an IndexError."""
    owners = [(1, 2, 30 + place) for place, _ in enumerate(pack)]
    empty = next(place for place, one in enumerate(pack) if len(one) == 0)
    with pytest.raises(UnusableDocument, match=rf"source 1, shard 2, row {30 + empty}\): it has no tokens"):
        processor.collate([[SECOND], pack], [[(0, 0, 0)], owners])


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (replace(FIRST, weights=np.ones(2, np.float32)), "columns have the shapes"),
        (replace(FIRST, modality=np.zeros(4, np.int8)), "columns have the shapes"),
        (replace(FIRST, factors=np.ones(4, np.float32)), "columns have the shapes"),
        (replace(FIRST, factors=np.float32([1, np.nan, 1])), "not finite"),
        (replace(FIRST, weights=np.float32([0, -1, 2])), "below 0"),
        (replace(FIRST, items=(PICTURE,)), "bear loss"),
        (replace(THIRD, items=(PICTURE._replace(start=3),)), "within 4 tokens"),
        (replace(THIRD, items=(PICTURE._replace(start=-1),)), "within 4 tokens"),
        (replace(THIRD, items=(PICTURE._replace(length=0),)), "items in order"),
        (replace(THIRD, weights=np.zeros(4, np.float32), items=(PICTURE, PICTURE._replace(start=0))), "items in order"),
    ],
)
def test_a_document_that_does_not_fit_itself_is_refused(processor: Processor, broken: Document, problem: str) -> None:
    with pytest.raises(UnusableDocument, match=rf"document 1 of pack 0 \(source 1, shard 0, row 7\).*{problem}"):
        processor.collate([[SECOND, broken]], [ROWS[0]])


def test_owners_and_seeds_that_are_not_one_for_each_are_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"'documents': \[2\], 'owners': \[1\]"):
        processor.collate([[FIRST, SECOND]], [ROWS[1]])
    with pytest.raises(ValueError, match="3 seeds for 1 packs"):
        processor.collate([[FIRST, SECOND]], [ROWS[0]], seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="at least one pack"):
        processor.collate([], [])


@pytest.mark.parametrize("length", [-1, 0, 4])
def test_a_document_is_cut_to_a_part_of_itself(length: int) -> None:
    with pytest.raises(LengthMismatch, match=f"3 tokens cannot be cut to {length}"):
        FIRST.cut(length)


def test_a_loader_worker_hands_a_batch_over_as_it_is_with_only_the_encoders_inputs_in_shared_memory(
    processor: Processor,
) -> None:
    media = Media(
        {"pixels": torch.arange(12).view(2, 6)}, ((1, 2), (1, 1)), torch.tensor([0, 1, 5]), torch.tensor([0, 2])
    )
    sent = processor.collate([[FIRST, SECOND], [THIRD]], ROWS, broken=[("a, row 1", "empty picture file")])
    sent = replace(sent, media={Modality.IMAGE: media})
    (received,) = DataLoader([sent], batch_size=None, num_workers=1)  # type: ignore[arg-type]
    came = received.media.pop(Modality.IMAGE)
    assert_equal_fields(replace(sent, media={}), received)
    assert torch.equal(media.inputs["pixels"], came.inputs["pixels"])
    assert_equal_fields(replace(media, inputs={}), replace(came, inputs={}))
    assert came.inputs["pixels"].is_shared()
    assert not any(tensor.is_shared() for tensor in (received.tokens, received.rows, came.slots, came.documents))


def assert_equal_fields(one: object, other: object) -> None:
    assert type(one) is type(other)
    for entry in fields(one):  # type: ignore[arg-type]
        first, second = getattr(one, entry.name), getattr(other, entry.name)
        if isinstance(first, torch.Tensor):
            assert (first.dtype, first.tolist()) == (second.dtype, second.tolist()), entry.name
        else:
            assert first == second, entry.name
