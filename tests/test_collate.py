"""Documents laid out by hand against what `collate` makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mm.packing.batch import IGNORE
from mm.packing.collate import Document, LengthMismatch, Processor
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
