"""From `model:` of a recipe to what is trained: a language model, or the autoencoder of a tokenizer."""

from __future__ import annotations

import torch

from mm.model.autoencoder import build_autoencoder
from mm.model.multimodal import ModelOptions, build_model
from mm.model.trainable import Trainable


def build_trainable(options: ModelOptions, *, meta: bool = False) -> Trainable:
    """The model of a recipe, with its pretrained parts loaded.

    Args:
        meta: build on the meta device without reading any weights, for planning and for loading a checkpoint.
    """
    if options.autoencoder is None:
        return build_model(options, meta=meta)
    with torch.device("meta" if meta else "cpu"):
        return build_autoencoder(options.autoencoder)
