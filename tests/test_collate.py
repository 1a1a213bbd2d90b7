"""Documents laid out by hand against what `collate` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mm.packing.batch import IGNORE, Media
from mm.packing.collate import Document, LengthMismatch, Processor
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
