"""A tokenizer that `mm train` has made, for use: its judges stay behind."""

from __future__ import annotations

import torch

from mm.configure import RecipeError, build
from mm.model.autoencoder import JudgedAutoencoder
from mm.model.build import build_trainable
from mm.tokenizers.base import MediaTokenizer, fingerprint
from mm.tokenizers.image import ImageAutoencoder
from mm.train import checkpoint
from mm.train.export import recipe_of


class TrainedTokenizer(MediaTokenizer):
    """What a recipe names as ``{_target_: mm.train.tokenizer.TrainedTokenizer.load, weights: runs/tokenizer}``."""

    @classmethod
    def load(cls, weights: str) -> MediaTokenizer:
        """The tokenizer of a run's newest checkpoint, of a checkpoint or of an export, on the CPU.

        Its fingerprint is that of its options and weights, so an export has that of the checkpoint it was made of.

        Raises:
            CheckpointError: there are no weights, or no recipe with them.
            RecipeError: another kind of model was trained.
        """
        path = checkpoint.find(weights)
        options = recipe_of(path).model
        if options.autoencoder is None:
            raise RecipeError(f"{weights} has trained a language model; a tokenizer is trained by `model.autoencoder`")
        model = build_trainable(options, meta=True)
        assert isinstance(model, JudgedAutoencoder)
        with torch.device("cpu"):
            model.tokenizer = build(options.autoencoder.tokenizer, ImageAutoencoder)
            model.updates = torch.zeros_like(model.updates, device="cpu")
        model.judges.to_empty(device="cpu")  # to be read as well, but not from where they came
        checkpoint.load_weights(path, model)
        tokenizer = model.tokenizer.eval().requires_grad_(False)
        tokenizer.fingerprint = fingerprint([tokenizer.fingerprint], tokenizer.state_dict().items())
        return tokenizer
