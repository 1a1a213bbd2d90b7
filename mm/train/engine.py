"""Which engine trains a run: FSDP2 or DeepSpeed, behind `mm.train.parallel.Engine`."""

from __future__ import annotations

from pathlib import Path

import torch

from mm.configure import RecipeError
from mm.model.multimodal import MultimodalLM
from mm.model.trainable import Trainable
from mm.train import checkpoint
from mm.train.optim import OptimOptions, build_optimizer, materialise_state
from mm.train.parallel import Engine, ParallelOptions, World, check_parallel, join_context, parallelise
from mm.train.zero import check_zero, zero_engine


def check_engine(options: ParallelOptions, optim: OptimOptions, processes: int, capacity: int) -> None:
    """Raise `RecipeError` unless the options fit the engine, this many processes, their devices and packs."""
    check_parallel(options, processes, capacity)
    if options.engine == "deepspeed":
        check_zero(options, optim)


def build_engine(
    model: Trainable,
    world: World,
    dtype: torch.dtype,
    options: ParallelOptions,
    optim: OptimOptions,
    resumed: Path | None = None,
) -> Engine:
    """Shard the model over all processes, in place, with an optimizer that could be saved at once.

    Args:
        model: frozen as far as it shall be; other processes than the first may have it on the meta device.
        dtype: of compute.
        resumed: the checkpoint that will be loaded.

    Raises:
        RecipeError: the options are not for this kind of model.
    """
    if isinstance(model, MultimodalLM):
        model.decoder.context = join_context(model.decoder.config, world, options.context)
    elif options.context > 1 or options.engine != "fsdp2":
        raise RecipeError(
            f"parallel: an autoencoder trains with FSDP2 and context 1, and the recipe has engine {options.engine} and "
            f"context {options.context}; leave them out"
        )
    if options.engine == "deepspeed":
        updates = checkpoint.read_updates(resumed) if resumed else {}
        return zero_engine(model, world, dtype, options, optim, updates)
    parallelise(model, world, dtype, options)
    optimizer = build_optimizer(model, optim, dtype)
    materialise_state(optimizer, optim)
    return Engine(model, optimizer, world, optim)
