"""`mm estimate` against what training really holds, on the small world's model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mm import configure
from mm.configure import RecipeError
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.hub import save_decoder
from mm.model.multimodal import DecoderOptions, ModelOptions, build_model
from mm.train.dataset import open_data
from mm.train.estimate import CONTEXT, GPUS, Estimate, gpu_named, largest_micro_batch, ways_out
from mm.train.footprint import footprint, full_batch
from mm.train.optim import parameter_groups
from mm.train.preview import planned
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests.small_world import DECODER, environment

PICTURES = (
    *(f"packing.limits.{modality}={limit}" for modality, limit in (("image", 3), ("speech", 0), ("point", 0))),
    *(f"data.sources.{source}=null" for source in ("speech", "points", "chats")),
)
"""Pictures, pages and text, at most three pictures a pack: packs that are nearly full of both."""

MEASURE = """
import json, sys
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from mm.model.multimodal import build_model
from mm.packing.materialise import MicroStep
from mm.train.optim import build_optimizer, freeze, materialise_state
from mm.train.parallel import join_world, parallelise, resolve_precision
from mm.train.preview import planned
from mm.train.recipe import Recipe


def nbytes(tensors):
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values())


def main(path, out, *changes):
    recipe = Recipe.load(path, changes)
    dataset = planned(recipe).materialiser()
    with join_world() as world:
        dtype = resolve_precision(recipe.precision, world.device)
        model = build_model(recipe.model).train()
        freeze(model, recipe.optim)
        parallelise(model, world, dtype)
        optimizer = build_optimizer(model, recipe.optim, dtype)
        materialise_state(optimizer, recipe.optim)
        packs = [dataset[MicroStep(0, (number,))] for number in range(8)]
        batch = max(packs, key=lambda pack: (sum(len(media.grids) for media in pack.media.values()), len(pack.tokens)))

        kept, weights = {}, set()
        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor
        def note(module, inputs):
            weights.update(parameter.untyped_storage().data_ptr() for parameter in module.parameters(recurse=False))
        for module in model.modules():
            module.register_forward_pre_hook(note)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(batch).total
        loss.backward()

        found = {
            "parameters": nbytes(model.parameters()),
            "gradients": nbytes(p.grad for p in model.parameters() if p.grad is not None),
            "optimizer state": nbytes(
                value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
            ),
            "kept": sum(size for pointer, size in kept.items() if pointer not in weights),
            "tokens": len(batch.tokens),
            "items": sum(len(media.grids) for media in batch.media.values()),
        }
        if world.is_first:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def measured(folder: Path, processes: int, recipe: Path, *changes: str) -> dict[str, int]:
    """What the first of some real processes holds after a micro-step on the fullest of the first packs."""
    script, out = folder / "measure.py", folder / "measured.json"
    script.write_text(MEASURE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(script), str(recipe), str(out), *changes]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


STATES = ("parameters", "gradients", "optimizer state")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        ("precision=fp32",),
        ("precision=bf16", "optim.kind=muon", "optim.average={}", "optim.parts=[{match: '^encoders.image', freeze: true}]"),
    ],
    ids=["adamw", "muon, averaged, partly frozen"],
)
def test_weights_gradients_and_optimizer_state_are_those_of_training_to_the_byte(
    recipe: Path, tmp_path: Path, processes: int, changes: tuple[str, ...]
) -> None:
    real = measured(tmp_path, processes, recipe, *PICTURES, *changes)
    parts = footprint(Recipe.load(recipe, [*PICTURES, *changes]), processes).parts
    assert {name: parts[name] for name in STATES} == {name: real[name] for name in STATES}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_forward_keeps_for_the_backward_is_within_a_tenth_of_training(
    recipe: Path, tmp_path: Path, processes: int
) -> None:
    real = measured(tmp_path, processes, recipe, *PICTURES, "precision=bf16")
    assert real["items"] == 3
    assert real["tokens"] > 120
    kept = footprint(Recipe.load(recipe, [*PICTURES, "precision=bf16"]), processes).kept
    assert sum(kept.values()) == pytest.approx(real["kept"], rel=0.1)
