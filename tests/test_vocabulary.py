"""The joint vocabulary: every id means one thing, whichever modalities are discrete."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.configure import RecipeError
from mm.sample import Modality
from mm.tokenizers.vocabulary import Codebook, Vocabulary

MEDIA = [modality for modality in Modality if modality is not Modality.TEXT]


@given(st.integers(1, 300), st.dictionaries(st.sampled_from(MEDIA), st.integers(1, 50)))
def test_words_ends_and_codes_share_no_id_and_leave_none_unused(text: int, sizes: dict[Modality, int]) -> None:
    vocabulary = Vocabulary.of(text, sizes)
    ids = list(range(text))
    for codebook in vocabulary.codebooks.values():
        ids += [codebook.begin, codebook.end, *codebook.ids]
    assert sorted(ids) == list(range(vocabulary.size))
    assert {modality: codebook.size for modality, codebook in vocabulary.codebooks.items()} == sizes


def test_codebooks_come_in_the_order_of_modalities_however_they_were_named() -> None:
    vocabulary = Vocabulary.of(100, {Modality.SPEECH: 3, Modality.IMAGE: 5})
    assert vocabulary.codebooks == {
        Modality.IMAGE: Codebook(100, 101, 102, 5),
        Modality.SPEECH: Codebook(107, 108, 109, 3),
    }
    assert vocabulary == Vocabulary.of(100, {Modality.IMAGE: 5, Modality.SPEECH: 3})
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_an_item_is_spelled_as_begin_codes_and_end() -> None:
    assert Codebook(begin=10, end=11, first=12, size=4).spell([3, 0]).tolist() == [10, 15, 12, 11]


@pytest.mark.parametrize("codes", [[0, 4], [-1]])
def test_a_code_beyond_the_codebook_is_refused_since_it_would_mean_another_id(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="of a codebook of 4"):
        Codebook(begin=10, end=11, first=12, size=4).spell(codes)


def test_a_decoder_with_too_few_ids_is_told_how_many_it_needs() -> None:
    vocabulary = Vocabulary.of(100, {Modality.IMAGE: 64})
    vocabulary.check_fits(166)
    with pytest.raises(
        RecipeError, match=r"a vocabulary of 165; the recipe needs at least 166, 100 for text \+ 2 \+ 64"
    ):
        vocabulary.check_fits(165)
