"""What a recipe takes on GPUs that one does not have yet: memory, step time, GPU hours. `mm estimate`, see
docs/estimate.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table

from mm import configure
from mm.configure import RecipeError
from mm.model.multimodal import build_model
from mm.terminal import styled, track
from mm.train.activation import Activations
from mm.train.dataset import check_division
from mm.train.footprint import Footprint, footprint
from mm.train.meter import datasheet_flops
from mm.train.optim import freeze
from mm.train.preview import spoken
from mm.train.recipe import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    model: its name as in `mm.train.meter.DATASHEET_FLOPS`
    memory: bytes that CUDA can give, which is less than on the box
    """

    model: str
    memory: int

    @property
    def flops(self) -> float:
        """Dense bf16 FLOP/s."""
        flops = datasheet_flops(self.model)
        assert flops is not None
        return flops


GPUS = {
    "rtx-4090": Gpu("RTX 4090", int(23.6 * GIB)),
    "a100-40g": Gpu("A100", int(39.4 * GIB)),
    "a100-80g": Gpu("A100", int(79.1 * GIB)),
    "h100": Gpu("H100", int(79.1 * GIB)),
    "h200": Gpu("H200", int(139.8 * GIB)),
}
"""GPUs by name, with the total capacity that torch names when memory runs out on them."""

CONTEXT = int(1.5 * GIB)
"""CUDA's context, NCCL's buffers and cuBLAS's workspaces. An allowance, not measured here."""

FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the allocator loses. An allowance, not measured here."""

LESS_KEPT: dict[Activations, tuple[Activations, ...]] = {
    "none": ("selective", "full"),
    "selective": ("full",),
    "full": (),
}
"""What keeps less than each choice of `parallel.activations`."""


@dataclass(frozen=True)
class Estimate:
    """What a recipe, without stages or one of its stages, takes on each of some GPUs.

    footprint: of a micro-step with the recipe's micro-batch
    """

    recipe: Recipe
    gpus: int
    gpu: Gpu
    footprint: Footprint

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, gpu: Gpu) -> Estimate:
        """Raises:
        RecipeError: the global batch, or the copies of the model, cannot be divided over the GPUs.
        """
        check_division(recipe.packing, gpus, recipe.micro_batch)
        return cls(recipe, gpus, gpu, footprint(recipe, gpus))

    @property
    def step_flops(self) -> float:
        """Training FLOPs of a whole step on all GPUs, if all its packs were full."""
        return self.footprint.flops * self.recipe.packing.packs_per_batch / self.recipe.micro_batch

    @property
    def overhead(self) -> int:
        """Bytes beside the tensors: `CONTEXT` and `FRAGMENTATION`."""
        return CONTEXT + int(FRAGMENTATION * self.footprint.total)

    @property
    def total(self) -> int:
        return self.footprint.total + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.memory

    def step_seconds(self, mfu: float) -> float:
        """Time of a step at a share of the peak of the data sheet."""
        return self.step_flops / (self.gpus * self.gpu.flops * mfu)


def gpu_named(name: str) -> Gpu:
    """Raises:
    RecipeError: no such GPU.
    """
    if name not in GPUS:
        raise RecipeError(f"--gpu: {name!r} is not known; known are {', '.join(GPUS)}")
    return GPUS[name]


def largest_micro_batch(estimate: Estimate) -> Estimate | None:
    """The same recipe with the largest micro-batch that fits, of those that divide the batch; None if not one pack."""
    recipe = estimate.recipe
    packs = recipe.packing.packs_per_batch // estimate.gpus
    divisors = [count for count in range(1, packs + 1) if packs % count == 0]

    def tried(micro_batches: list[int]) -> Iterator[Estimate]:
        for count in track(micro_batches, description="largest micro-batch", transient=True):
            yield Estimate.of(configure.derive(recipe, {"micro_batch": count}), estimate.gpus, estimate.gpu)

    if estimate.fits:
        larger = tried([count for count in divisors if count > recipe.micro_batch])
        return [estimate, *takewhile(lambda other: other.fits, larger)][-1]
    smaller = tried([count for count in reversed(divisors) if count < recipe.micro_batch])
    return next((other for other in smaller if other.fits), None)


def ways_out(recipe: Recipe, gpus: int) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """What could be changed to need less memory: (in words, changes to the recipe, GPUs)."""
    optim, packing, parallel = recipe.optim, recipe.packing, recipe.parallel
    if recipe.micro_batch > 1:
        yield "micro_batch=1", {"micro_batch": 1}, gpus
    for activations in LESS_KEPT[parallel.activations]:
        yield f"parallel.activations={activations}", {"parallel": {"activations": activations}}, gpus
    if parallel.reshard_after_forward == "never":
        yield "parallel.reshard_after_forward=default", {"parallel": {"reshard_after_forward": "default"}}, gpus
    if parallel.replicate > 1:
        yield "parallel.replicate=1", {"parallel": {"replicate": 1}}, gpus
    if not parallel.offload:
        yield "parallel.offload=true", {"parallel": {"offload": True}}, gpus
    if recipe.precision == "fp32":
        yield "precision=bf16", {"precision": "bf16"}, gpus
    for modality, limit in packing.limits.items():
        if limit > 1:
            halved = {"packing": {"limits": {modality: limit // 2}}}
            yield f"packing.limits.{modality}={limit // 2}", halved, gpus
    if packing.capacity > 1:
        limits = {modality: -(-limit // 2) for modality, limit in packing.limits.items()}
        smaller = {"capacity": packing.capacity // 2, "limits": limits}
        yield f"packing.capacity={packing.capacity // 2}, limits halved", {"packing": smaller}, gpus
    for words, match in (("the encoders", r"^encoders\."), ("the embedding", r"^decoder\.embedding")):
        if (parts := _parts_with_frozen(recipe, match)) is not None:
            yield f"freeze {words}: optim.parts, {{match: '{match}', freeze: true}}", {"optim": {"parts": parts}}, gpus
    if optim.kind == "adamw":
        yield "optim.kind=muon", {"optim": {"kind": "muon"}}, gpus
    if optim.average is not None:
        yield "optim.average=null", {"optim": {"average": None}}, gpus
    if packing.packs_per_batch % (2 * gpus * recipe.micro_batch) == 0:
        yield f"{2 * gpus} GPUs", {}, 2 * gpus


def _parts_with_frozen(recipe: Recipe, match: str) -> list[dict[str, Any]] | None:
    """`optim.parts` that freeze what matches as well; None where nothing of it trains, or nothing else does."""
    model = build_model(recipe.model, meta=True)
    freeze(model, recipe.optim)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name, _ in model.named_parameters() if not re.search(match, name)]
    if not any(re.search(match, name) for name in trained) or not set(trained) & set(others):
        return None
    deciding = [part for part in recipe.optim.parts if any(re.search(part.match, name) for name in others)]
    return [{"match": match, "freeze": True}, *configure.dump(deciding)]


# ----------------------------------------------------------------------------------------------------------- tables


def report(recipe: Recipe, gpus: int, gpu: Gpu, mfu: float) -> Iterator[RenderableType]:
    """Tables for a recipe, or for each of its stages: memory by part, time, and what to change if it does not fit.

    Raises:
        RecipeError: a number of GPUs, or a share of their peak, that cannot be.
    """
    if gpus < 1:
        raise RecipeError(f"--gpus is {gpus} and must be at least 1")
    if not 0 < mfu <= 1:
        raise RecipeError(f"--mfu is {mfu}; it is a share of the GPU's peak, above 0 and at most 1")
    for number, stage in enumerate(recipe.stage_recipes()):
        if recipe.stages:
            yield Rule(f"stage {number}")
        estimate = Estimate.of(stage, gpus, gpu)
        yield memory_table(estimate)
        yield run_table(estimate, mfu)
        if not estimate.fits:
            yield ways_out_table(estimate)


def memory_table(estimate: Estimate) -> Table:
    """Memory of the first GPU, by part, at the moment of a step at which it is largest."""
    packing, micro_batch = estimate.recipe.packing, estimate.recipe.micro_batch
    device = "1 GPU" if estimate.gpus == 1 else f"each of {estimate.gpus} GPUs"
    packs = "pack" if micro_batch == 1 else "packs"
    table = Table(
        "at the peak of a step",
        title=f"{device}, {micro_batch} {packs} of {packing.capacity:,} tokens at once",
        title_justify="left",
    )
    table.add_column("GiB", justify="right")
    for part, size in estimate.footprint.parts.items():
        if size >= GIB / 200:  # less would read 0.00
            table.add_row(part, _gib(size))
    table.add_row(f"overhead: context, {FRAGMENTATION:.0%} lost by the allocator", _gib(estimate.overhead))
    verdict = "fits" if estimate.fits else ("does not fit", "red")
    table.add_section()
    table.add_row(styled("total: ", verdict, f" into {_gib(estimate.gpu.memory)} GiB"), _gib(estimate.total))
    return table


def run_table(estimate: Estimate, mfu: float) -> Table:
    """Largest micro-batch, FLOPs, step time and GPU hours."""
    recipe, packing = estimate.recipe, estimate.recipe.packing
    table = Table("figure", title="the run, all packs full", title_justify="left")
    table.add_column("value", justify="right")
    largest = largest_micro_batch(estimate)
    fitting = "none" if largest is None else f"{largest.recipe.micro_batch} packs, {_gib(largest.total)} GiB"
    table.add_row("largest micro_batch that fits", fitting)
    table.add_row("FLOPs of a step", f"{estimate.step_flops:.3g}")
    seconds = estimate.step_seconds(mfu)
    table.add_row(f"step at {mfu:.0%} MFU of {estimate.gpu.flops / 1e12:.0f} TFLOP/s", spoken(seconds))
    tokens = packing.packs_per_batch * packing.capacity
    table.add_row("tokens a second and GPU", f"{tokens / seconds / estimate.gpus:,.0f}")
    hours = seconds * estimate.gpus / 3600
    table.add_row("GPU hours for a billion tokens", f"{hours * 1e9 / tokens:,.1f}")
    if recipe.steps is not None:
        table.add_row(f"GPU hours of {recipe.steps:,} steps", f"{hours * recipe.steps:,.3g}")
    return table


def ways_out_table(estimate: Estimate) -> Table:
    """What each change would save on its own, the most first."""
    found = []
    ways = list(ways_out(estimate.recipe, estimate.gpus))
    for words, changes, gpus in track(ways, description="what to change", transient=True):
        changed = configure.derive(estimate.recipe, changes)
        found.append((words, Estimate.of(changed, gpus, estimate.gpu)))
    table = Table("change", title="what to change", title_justify="left")
    for column in ("saves GiB", "total GiB", "fits"):
        table.add_column(column, justify="right")
    for words, other in sorted(found, key=lambda pair: pair[1].total):
        if other.total < estimate.total:
            table.add_row(words, _gib(estimate.total - other.total), _gib(other.total), "yes" if other.fits else "no")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
