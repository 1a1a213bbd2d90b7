"""Memory of a training step on one of N GPUs, accounted without a GPU and without weights.

    model on the meta device ─▶ fake tensors ─▶ `parallelise` over N processes that do not exist ─▶ optimizer's state
    packs that are full of tokens and items ─▶ forward and backward under torch's memory tracker ─▶ bytes by part

The suite's own code runs, on tensors that have sizes and no values, so nothing is modelled twice: what is sharded, kept
for the backward, computed again or gathered is what the code does. It differs from a GPU, where the first three are
corrected:

- RMS norms in 16 bits have no fused kernel on a CPU (`fused_norms`);
- the head works on chunks of the CPU's size and precision (`head_beyond_cpu`);
- what `parallel.offload` moves to the host's memory stands in that of the device (`_without_offloaded`);
- attention takes the CPU's fused kernel, which keeps what FlashAttention keeps, and a copy of the output in order;
- blocks are not compiled, with `parallel.compile` neither;
- one stream: what a GPU gathers ahead while it computes is not counted twice;
- the allocator loses nothing, and CUDA and NCCL have no memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mm.configure import RecipeError
from mm.layers.cross_entropy import default_chunk
from mm.media import Item, Waveform, measure
from mm.model.multimodal import MultimodalLM, build_model
from mm.packing.batch import Batch, Media
from mm.packing.options import PackingOptions
from mm.sample import Modality
from mm.train.meter import training_factors
from mm.train.optim import build_optimizer, freeze, materialise_state
from mm.train.parallel import Precision, World, check_parallel, leave_world, parallelise
from mm.train.recipe import Recipe

LARGE_ITEMS: dict[Modality, Callable[[], Item]] = {
    Modality.IMAGE: lambda: Pillow.new("RGB", (1920, 1080)),
    Modality.SPEECH: lambda: Waveform(np.zeros(480_000, np.float32), 16_000),
    Modality.POINT: lambda: np.random.default_rng(0).normal(size=(8192, 3)).astype(np.float32),
}
"""A decoded item of each modality that is as long as they usually get: a recording lasts 30 s."""

TRACKED = {
    "parameters": ("Sharded Param", "Parameter"),
    "buffers": ("Buffer",),
    "gradients": ("Sharded Grad", "Gradient"),
    "optimizer state": ("OptState", "Optstate"),
    "gathered weights": ("Unsharded Param", "All Gather"),
    "gradients to reduce": ("Unsharded Grad", "Reduce Scatter"),
}
"""Our names of what torch's trackers tell apart (with FSDP2 and without); the rest are activations."""

ACTIVATIONS = "activations"
HEAD = "head, loss and temporaries"


@dataclass(frozen=True)
class Footprint:
    """What the first of the GPUs holds when a micro-step needs most, and what the micro-step computes.

    parts: bytes by part, see `TRACKED`; then ``activations of`` encoders, adapters and decoder that the backward still
        needs at that moment, `HEAD` with what a checkpointed block computes again, and the ``batches`` of the step
    kept: bytes that the whole forward keeps for the backward, by part of the model: ``encoders.image``,
        ``adapters.image``, …, ``decoder``, ``head``
    flops: of training on the micro-batch; what is computed again is not counted, see `training_factors`
    """

    parts: dict[str, int]
    kept: dict[str, int]
    flops: float

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def footprint(recipe: Recipe, gpus: int) -> Footprint:
    """What a micro-step of the recipe takes on each of `gpus` GPUs. Nothing is read but sizes; takes seconds.

    Gradients of an earlier micro-step are there already if a step has several.

    Raises:
        RecipeError: the GPUs do not divide into the groups of `parallel.replicate`, or an option is not counted here.
    """
    if recipe.parallel.context > 1 or recipe.parallel.engine != "fsdp2":
        raise RecipeError(
            f"mm estimate counts FSDP2 with parallel.context 1, and the recipe has engine {recipe.parallel.engine} and "
            f"context {recipe.parallel.context}. Leave them out: context divides activations, and ZeRO 3 is like FSDP2"
        )
    if recipe.model.decoder.resolve().depth is not None:
        raise RecipeError(
            "mm estimate runs a step without values, and with depth routing these say which tokens a layer is computed "
            "for. Leave model.decoder.config.depth out: without it activations are larger, so what fits, fits"
        )
    # whether this machine could offload is no matter
    check_parallel(replace(recipe.parallel, offload=False), gpus, recipe.packing.capacity)
    micro_steps = recipe.packing.packs_per_batch // (gpus * recipe.micro_batch)
    model = build_model(recipe.model, meta=True).train()
    freeze(model, recipe.optim)
    batch = full_batch(model, recipe.packing, recipe.micro_batch)
    factors = training_factors(model.trained_parts())
    flops = sum(factors[part] * forward for part, forward in model.flops(batch).items())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with imaginary_world(gpus) as world:
        optimizer = shard(model, recipe, world, fake)
        if micro_steps > 1 or recipe.parallel.offload:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        batch = on_device(batch, fake)
        parts, kept = run_tracked(model, optimizer, batch, fake)
    if recipe.parallel.offload:
        parts = _without_offloaded(parts, sharded=isinstance(model, FSDPModule))
    activations = parts.pop(ACTIVATIONS)
    for part, size in kept.items():  # the backward frees them from the last to the first
        if part != "head":
            parts[f"activations of {part}"] = min(size, activations)
            activations -= min(size, activations)
    config, dtype = model.decoder.config, compute_dtype(recipe.precision)
    parts[HEAD] = activations + head_beyond_cpu(len(batch.labels), config.vocabulary, config.width, dtype)
    parts["batches"] = micro_steps * batch_bytes(batch)
    return Footprint(parts, kept, flops)


def compute_dtype(precision: Precision) -> torch.dtype:
    """What `resolve_precision` gives on a GPU that multiplies bf16."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@contextmanager
def imaginary_world(size: int) -> Iterator[World]:
    """The first of `size` processes; the others do not exist, and collectives with them do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        leave_world()


def shard(model: MultimodalLM, recipe: Recipe, world: World, fake: FakeTensorMode) -> torch.optim.Optimizer:
    """Shard a model on the meta device and give it an optimizer with its state, as a run does, but in fake memory."""
    dtype = compute_dtype(recipe.precision)
    with fake:
        model.to_empty(device=world.device)
    model.decoder.attention_backend = "auto"  # a GPU's would refuse the CPU of this imaginary world
    parallelise(model, world, dtype, replace(recipe.parallel, offload=False, compile=False))
    optimizer = build_optimizer(model, recipe.optim, dtype)
    with fake:
        materialise_state(optimizer, recipe.optim)
    return optimizer


# ------------------------------------------------------------------------------------------------------- the batch


def full_batch(model: MultimodalLM, packing: PackingOptions, packs: int) -> Batch:
    """A micro-batch that is as full as the packing allows: of every modality as many items as the limits and then the
    capacity allow, and behind them text to the last token. A pack is one document, and every token bears loss."""
    capacity = packing.capacity
    media, end = {}, 0
    for modality in model.modalities:
        transform, adapter = model.entrances[modality]
        prepared, grid = _large_item(model, modality)
        length = adapter.length(grid)
        items = min(packing.limits.get(modality.label, capacity), (capacity - end) // length)
        if items:
            slots = torch.arange(end, end + items * length)
            media[modality] = Media(
                inputs=transform.collate([prepared] * items * packs),
                grids=(grid,) * items * packs,
                slots=(slots + capacity * torch.arange(packs)[:, None]).flatten(),
                documents=torch.arange(packs).repeat_interleave(items),
            )
        end += items * length
    offsets = torch.arange(0, capacity * (packs + 1), capacity, dtype=torch.int32)
    return Batch(
        tokens=torch.zeros(packs * capacity, dtype=torch.int64),
        positions=torch.arange(capacity).repeat(packs),
        labels=torch.zeros(packs * capacity, dtype=torch.int64),
        weights=torch.ones(packs * capacity),
        modality=torch.zeros(packs * capacity, dtype=torch.int8),
        offsets=offsets,
        packs=offsets,
        rows=torch.zeros(packs, 3, dtype=torch.int64),
        seeds=torch.zeros(packs, dtype=torch.int64),
        media=media,
    )


def _large_item(model: MultimodalLM, modality: Modality) -> tuple[Tensor, tuple[int, ...]]:
    """A prepared item as long as they usually get, and its feature grid."""
    item, transform = LARGE_ITEMS[modality](), model.entrances[modality].transform
    return transform.prepare(item), transform.grid(measure(item))


def batch_bytes(batch: Batch) -> int:
    """Bytes of what a batch brings to the device."""
    tensors = [getattr(batch, name) for name in ("tokens", "positions", "labels", "weights", "modality")]
    for media in batch.media.values():
        tensors += [*media.inputs.values(), media.slots, media.documents]
    return sum(tensor.nbytes for tensor in tensors)


def on_device(batch: Batch, fake: FakeTensorMode) -> Batch:
    """The batch with fake media and positions; its other integers, which layouts and slots need, stay what they are."""
    values: dict[str, Any] = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    values["positions"] = fake.from_tensor(batch.positions)
    values["media"] = {
        modality: Media(
            {name: fake.from_tensor(tensor) for name, tensor in media.inputs.items()},
            media.grids,
            media.slots,
            media.documents,
        )
        for modality, media in batch.media.items()
    }
    return Batch(**values)


# ------------------------------------------------------------------------------------------------------- accounting


class _ComputesIntegers(TorchDispatchMode):
    """Computes what depends on no fake tensor, such as offsets, masks and indices: code branches on their values.

    A fake tensor has no values. What makes tensors from nothing makes real ones of integers only.
    """

    ARANGE = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes itself apart first
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dtype = kwargs.get("dtype")
        makes_integers = func in self.ARANGE or (dtype is not None and not dtype.is_floating_point)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors) or not (tensors or makes_integers):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


@contextmanager
def fused_norms() -> Iterator[None]:
    """RMS norms take and keep the memory of CUDA's kernel; in 16 bits a CPU's keep their input twice in float32.

    The function is replaced, because on CPUs it is taken apart before a dispatch mode sees it.
    """
    original, F.rms_norm = F.rms_norm, _fused_norm
    try:
        yield
    finally:
        F.rms_norm = original


def _fused_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedNorm.apply(input, weight)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None) -> Tensor:
        scale = hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, scale)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = zip(ctx.saved_tensors[:2], ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in inputs)


class _Peak(MemTracker):
    """Keeps the peak of the whole only; the original looks at every module at every operator."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


class _Tracker(_Peak):
    """Torch's tracker for a model without FSDP2; the original fails on frozen parameters, whose gradient it hooks."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        trains = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trains)


class _ShardedTracker(_Peak, FSDPMemTracker):
    """Torch's tracker for a model with FSDP2."""


def run_tracked(
    model: MultimodalLM, optimizer: torch.optim.Optimizer, batch: Batch, fake: FakeTensorMode
) -> tuple[dict[str, int], dict[str, int]]:
    """Forward and backward on fake tensors: (bytes at the peak by `TRACKED` and `ACTIVATIONS`, bytes kept by part)."""
    if isinstance(model, FSDPModule):
        tracker: MemTracker = _ShardedTracker(model, optimizer)
    else:
        tracker = _Tracker()
        tracker.track_external(model, optimizer)
    with fused_norms(), fake, tracker, _ComputesIntegers():
        with kept_by_part(model, lambda: _by_part(tracker.get_tracker_snapshot())[ACTIVATIONS]) as kept:
            loss = model(batch).total
        loss.backward()
    return _by_part(tracker.get_tracker_snapshot("peak")), kept


def _by_part(snapshot: Mapping[torch.device, Mapping[Any, int]]) -> dict[str, int]:
    """Bytes by `TRACKED`, and the rest as `ACTIVATIONS`, of a snapshot of the tracker."""
    (tracked,) = snapshot.values()
    # Keys are members of an enumeration, and the word Total.
    sizes = {str(getattr(key, "value", key)): size for key, size in tracked.items()}
    parts = {name: sum(sizes.get(key, 0) for key in keys) for name, keys in TRACKED.items()}
    return parts | {ACTIVATIONS: sizes["Total"] - sum(parts.values())}


@contextmanager
def kept_by_part(model: MultimodalLM, held: Callable[[], int]) -> Iterator[dict[str, int]]:
    """What a forward keeps for its backward, by part of the model as in `Footprint.kept`; complete at the end.

    A part keeps what is there after it has run and was not before. The embeddings, made between parts, are the
    decoder's.

    Args:
        held: bytes of activations that there are now.
    """
    kept: dict[str, int] = {}

    def enter(part: str) -> None:
        kept[part] = -held()

    def leave(part: str) -> None:
        kept[part] += held()

    parts = {f"encoders.{name}": module for name, module in model.encoders.items()}
    parts |= {f"adapters.{name}": module for name, module in model.adapters.items()}
    with ExitStack() as hooks:
        for part, module in parts.items():
            hooks.callback(module.register_forward_pre_hook(lambda *_, part=part: enter(part)).remove)
            hooks.callback(module.register_forward_hook(lambda *_, part=part: leave(part)).remove)
        rest = model.decoder.register_forward_hook(lambda *_: kept.update(decoder=held() - sum(kept.values())))
        hooks.callback(rest.remove)
        yield kept
        kept["head"] = held() - sum(kept.values())


def _without_offloaded(parts: Mapping[str, int], sharded: bool) -> dict[str, int]:
    """Parts without what `parallel.offload` keeps in the host's memory.

    On one process in float32 nothing was sharded. FSDP2 would gather all weights there and keep them: as many bytes.
    """
    offloaded = ("gradients", "optimizer state", *(("parameters",) if sharded else ()))
    return {name: 0 if name in offloaded else size for name, size in parts.items()}


def head_beyond_cpu(labels: int, vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that the head takes on a GPU beyond those on a CPU, see `mm.layers.cross_entropy`.

    A chunk is larger. In 16 bits a CPU widens the weight, and a GPU, whose products are wider than their operands, does
    not; a chunk's gradient lies in the memory of its logits.
    """
    on_gpu, on_cpu = (4 * vocabulary * min(default_chunk(device, width), labels) for device in ("cuda", "cpu"))
    if dtype != torch.float32:
        on_cpu += 4 * vocabulary * width
    return max(0, on_gpu - on_cpu)
