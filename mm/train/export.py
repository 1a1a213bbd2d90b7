"""A trained model as a folder of its own: weights, the resolved recipe, and how to load both again.

EXPORT/model.safetensors  recipe.yaml  versions.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from mm import configure
from mm.model.build import build_trainable
from mm.model.multimodal import MultimodalLM, build_model, build_processor
from mm.model.trainable import Trainable
from mm.packing.collate import Processor
from mm.train import checkpoint
from mm.train.checkpoint import CheckpointError
from mm.train.recipe import Recipe
from mm.train.versions import versions


class Trained(NamedTuple):
    """A model in float32 on the CPU, ready to answer, with the recipe it was trained by."""

    recipe: Recipe
    model: MultimodalLM
    processor: Processor


def load_trained(path: str | Path) -> Trained:
    """The model of an export, a checkpoint or a run folder.

    Raises:
        CheckpointError: no weights or no recipe there, or they do not fit each other.
    """
    path = Path(path).expanduser()
    weights = checkpoint.find(path)
    recipe = recipe_of(weights)
    model = build_model(recipe.model)
    checkpoint.load_weights(weights, model)
    return Trained(recipe, model.eval(), build_processor(recipe.model, model, recipe.text_tokenizer()))


def export_run(path: str | Path, folder: Path, *, average: bool = False) -> Path:
    """Write the weights of a run or checkpoint as safetensors into `folder`, with the recipe. Returns `folder`.

    Args:
        average: write the average over updates (`optim.average`) of what was trained.

    Raises:
        CheckpointError: no weights, no recipe or no averages there.
    """
    weights = checkpoint.find(path)
    recipe = recipe_of(weights)
    model = build_trainable(recipe.model)
    checkpoint.load_weights(weights, model)
    if average:
        checkpoint.load_averages(weights, model)
    return _write(recipe, model, folder)


def export_mean(run: Path, count: int, folder: Path) -> Path:
    """Write the mean of the weights of a run's newest `count` checkpoints, as `export_run` does. Returns `folder`.

    Raises:
        CheckpointError: the run has fewer, or they are of different architectures.
    """
    paths = checkpoint.newest(run, count)
    recipe = recipe_of(paths[-1])
    model = build_trainable(recipe.model)
    checkpoint.load_mean(paths, model)
    return _write(recipe, model, folder)


def _write(recipe: Recipe, model: Trainable, folder: Path) -> Path:
    checkpoint.export_weights(folder, model)
    (folder / "recipe.yaml").write_text(configure.to_yaml(recipe), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
    return folder


def recipe_of(weights: Path) -> Recipe:
    """``recipe.yaml`` beside an export's weights, or that of a checkpoint's stage, from its run folder."""
    if (weights / "recipe.yaml").exists():
        return Recipe.load(weights / "recipe.yaml")
    if (weights.parent.parent / "recipe.yaml").exists():
        stage = len(checkpoint.read_position(weights).finished)
        return Recipe.load(weights.parent.parent / "recipe.yaml").stage_recipes()[stage]
    raise CheckpointError(f"{weights} has weights but no recipe.yaml with it or in its run folder")
