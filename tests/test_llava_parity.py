"""The whole forward and backward against Hugging Face's Llava with the same weights, on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.train import Sizes, build_ours, build_theirs, make_document, our_loss, pack, pad, their_loss
from mm.model.multimodal import MultimodalLM
from mm.packing.collate import Document

SIZES = Sizes(vocabulary=97, width=32, layers=2, heads=2, kv_heads=1, tower_width=32, tower_layers=2, side=2, patch=4)

DOCUMENTS = {
    "caption": [0, 5],
    "page, with neighbouring images and one at its end": [3, 0, 6, 4, 0],
    "text alone": [9],
    "another caption": [0, 2],
}
"""Text tokens before, between and after the images of each document."""


class Pair(NamedTuple):
    ours: MultimodalLM
    theirs: LlavaForConditionalGeneration


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    ours = build_ours(SIZES, tmp_path)
    return Pair(ours, build_theirs(SIZES, ours, tmp_path))


def documents(seed: int = 0) -> list[Document]:
    random = np.random.default_rng(seed)
    return [make_document(stretches, SIZES, random) for stretches in DOCUMENTS.values()]


def test_a_pack_has_the_loss_that_llava_computes_of_a_padded_batch(pair: Pair) -> None:
    ours = our_loss(pair.ours, pack(documents(), pair.ours))
    theirs = their_loss(pair.theirs, pad(documents(), SIZES, pair.ours))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_a_pack_has_the_gradients_that_llava_computes_of_a_padded_batch(pair: Pair) -> None:
    our_loss(pair.ours, pack(documents(), pair.ours)).backward()
    their_loss(pair.theirs, pad(documents(), SIZES, pair.ours)).backward()
    twins = {
        "decoder.embedding.weight": "model.language_model.embed_tokens.weight",
        "decoder.layers.0.attention.key.weight": "model.language_model.layers.0.self_attn.k_proj.weight",
        "adapters.image.feed_forward.0.weight": "model.multi_modal_projector.linear_1.weight",
        "encoders.image.tower.model.embeddings.patch_embedding.weight": (
            "model.vision_tower.embeddings.patch_embedding.weight"
        ),
    }
    for our_name, their_name in twins.items():
        ours, theirs = pair.ours.get_parameter(our_name).grad, pair.theirs.get_parameter(their_name).grad
        assert theirs is not None
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()), msg=our_name)


def test_llava_would_tell_if_two_images_changed_places(pair: Pair) -> None:
    arguments = pad(documents(), SIZES, pair.ours)
    right = their_loss(pair.theirs, arguments)
    swapped = their_loss(pair.theirs, {**arguments, "pixel_values": arguments["pixel_values"].flip(0)})
    assert abs(float((swapped - right).detach())) > 1e-4 * float(right.detach())
