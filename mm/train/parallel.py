"""Processes, precision and sharding: all the model code does not know of parallelism.

    model of the first process ──block by block──▶ broadcast ─▶ each process keeps its shard, and gathers the blocks
    (the others': meta device)                                  one after another when they compute

FSDP2 shards every block of the decoder and of the encoders on its own, and the rest as one unit. One process in
float32 is left as it is. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._dynamo import config as dynamo_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import swap_tensors

from mm.bounds import Between, Processes
from mm.configure import RecipeError
from mm.layers.context import Context, check_heads
from mm.layers.layout import Share
from mm.model.decoder import DecoderConfig
from mm.model.experts import AuxiliaryRouter
from mm.model.trainable import Trainable
from mm.train.activation import Activations, checkpoint_blocks
from mm.train.memory import MemoryPart, held_bytes, local_device
from mm.train.optim import OptimOptions, clip_gradients, restore_options

Precision = Literal["auto", "fp32", "bf16"]

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer state by parameter name, so that other parameter groups can load it."""


class MissingProcess(RuntimeError):
    """Not all processes of a run have come; the message says how many were expected, and of what to make sure."""


@dataclass(frozen=True)
class ParallelOptions:
    """`parallel:` of a recipe, see docs/parallel.md.

    engine: what shards and updates: fsdp2, or deepspeed, see `mm.train.zero`
    zero: stage of deepspeed: 1 shards optimizer state over the processes, 2 gradients too, 3 weights too
    context: neighbouring processes that share each stream, for packs that are too long for one, see `mm.layers.context`
    replicate: groups of processes that each hold the whole model once, sharded within the group (HSDP). 1 shards it
        over all processes
    reshard_after_forward: let go of a block's gathered weights after its forward and gather them again for its
        backward: `always`; `never`; `default`, for all but what the backward begins with
    offload: keep weights, gradients and optimizer state in the host's memory and update there; deepspeed leaves the
        weights that compute where they are
    activations: what blocks keep for their backward, see `mm.train.activation`
    compile: compile the blocks; packs are padded to their capacity so that shapes stay the same
    """

    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    zero: Annotated[int, Between(1, 3)] = 3
    context: Processes = 1
    replicate: Processes = 1
    reshard_after_forward: Literal["default", "always", "never"] = "default"
    offload: bool = False
    activations: Activations = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.replicate < 1:
            raise RecipeError(f"parallel.replicate is {self.replicate}; it counts copies of the model: at least 1")
        if self.zero not in (1, 2, 3):
            raise RecipeError(f"parallel.zero is {self.zero}; ZeRO has the stages 1, 2 and 3")
        if self.zero != 3 and self.engine != "deepspeed":
            raise RecipeError(
                f"parallel.zero is {self.zero}, and {self.engine} shards everything; add `engine: deepspeed` or leave "
                "it out"
            )
        if self.context < 1:
            raise RecipeError(f"parallel.context is {self.context}; it counts processes: at least 1")


def check_parallel(options: ParallelOptions, processes: int, capacity: int) -> None:
    """Raise `RecipeError` unless the options fit this many processes, their devices and packs of this capacity."""
    if processes % options.context or capacity % options.context:
        fitting = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0 == capacity % n)
        raise RecipeError(
            f"parallel.context is {options.context}, and it must divide the {processes} processes and the "
            f"{capacity} tokens of packing.capacity; these do: {fitting}"
        )
    if processes % options.replicate:
        fitting = ", ".join(str(groups) for groups in range(1, processes + 1) if processes % groups == 0)
        raise RecipeError(
            f"parallel.replicate is {options.replicate}, and {processes} processes do not divide into so many equal "
            f"groups; they do into {fitting}"
        )
    if options.offload and options.engine == "fsdp2" and not torch.cuda.is_available():
        raise RecipeError(
            "parallel.offload moves weights out of a GPU's memory, and there is no GPU here: they are in the host's "
            "memory already. Leave it out"
        )


@dataclass(frozen=True)
class World:
    """This process among all. `size` processes, one per device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def reader(self, context: int) -> Share:
        """Which of the readers of data this process is; `context` neighbours read the same."""
        return Share(self.rank // context, self.size // context)

    def share(self, context: int) -> Share:
        """Which part of its streams this process computes."""
        return Share(self.rank % context, context)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """The values summed over all processes, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, operation)
        return reduced.tolist()


def local_world() -> tuple[int, int]:
    """(rank, world size) as torchrun set them, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def leave_world() -> None:
    """Destroy the process group, and what still holds it. DeepSpeed keeps groups of its own and forgets them with it.

    A sharded model is a cycle of references and holds the group. Threads of gloo that outlive the interpreter take it
    down with SIGABRT ("terminate called without an active exception") after correct work: torchrun reports a failure.
    """
    gc.collect()
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


@contextmanager
def join_world(timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """The process group of a run: NCCL on GPUs, gloo on CPUs; one process needs no launcher.

    Raises:
        RecipeError: this process has no GPU of its own, and others do.
        MissingProcess: others have not come in time.
    """
    rank, size = local_world()
    device = local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = HashStore() if size == 1 else None
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except dist.DistError as error:
        raise MissingProcess(
            f"rank {rank} has waited {timeout.total_seconds():.0f} s in vain for all {size} processes (WORLD_SIZE) at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}. Start as many, with one launcher on "
            f"every machine, and see that they reach that address ({str(error).splitlines()[0]})"
        ) from error
    try:
        yield World(rank, size, device)
        if size > 1:
            dist.barrier()  # a process that leaves earlier makes the others exit with an error after correct work
    finally:
        leave_world()


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Where wanted, an operation of which no kernel sums in one order is an error that names it.

    cuBLAS reads the variable at the first product of the process; one that has multiplied on a GPU before has to have
    begun with it. https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of compute. ``auto`` takes bf16 where the device multiplies it natively and float32 elsewhere."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def parallelise(model: Trainable, world: World, dtype: torch.dtype, options: ParallelOptions) -> None:
    """Shard the model over all processes, in place; parameters stay float32, compute runs in `dtype`.

    Every process gets the weights of the first, bit by bit, and never holds more of them than its shards and one unit
    that is being sharded. Their own models are best built on the meta device. Freeze before.
    """
    blocks = model.blocks()
    if options.compile:
        compile_blocks(blocks)
    checkpoint_blocks(blocks, options.activations)
    if world.size == 1 and dtype == torch.float32 and not options.offload:
        if world.device.type != "cpu":  # where models are built; `to` fails on fake tensors, even if nothing moves
            model.to(world.device)
        return
    mesh = build_mesh(world, options.replicate)
    offload = CPUOffloadPolicy() if options.offload else OffloadPolicy()

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, reshard: bool) -> None:
        receive(chain(module.parameters(), module.buffers()), world)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)

    # BatchNorm's statistics are float32 and its kernels take no 16-bit parameters beside them, so it computes in
    # float32. `fold: true` of an encoder does away with it.
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=dtype)
    # Inputs are integers or already in the parameters' dtype. Casting them as well would round the loss weights to 16
    # bits, and copy the layout for every block: each would derive its masks and indices anew.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    spares = world.size > 1 and options.reshard_after_forward != "never"
    begins_backward = () if options.reshard_after_forward == "always" else (blocks[-1], model)

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            shard(module, exact, spares)
        if isinstance(module, AuxiliaryRouter):  # what it says has a gradient where the frozen block's output has none,
            shard(module, policy, spares)  # and FSDP2 gathers for the backward of what a unit gives
    for module in (*blocks, model):
        shard(module, policy, spares and module not in begins_backward)


def join_context(config: DecoderConfig, world: World, size: int) -> Context | None:
    """The neighbours with which this process shares its streams; None for itself alone.

    Raises:
        RecipeError: so many cannot share the decoder's heads, or a device must know more than its part of a stream.
    """
    if size == 1:
        return None
    try:
        check_heads(size, config.heads, config.kv_heads)
    except ValueError as error:
        raise RecipeError(f"parallel.context is {size}: {error}") from error
    whole = (config.experts, config.depth, config.dropout, config.media_attention == "bidirectional")
    if any(whole):
        raise RecipeError(
            f"parallel.context is {size}, and experts, depth routing, dropout and bidirectional media need all tokens "
            "of a pack on one device: set it to 1"
        )
    mesh = init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("reader", "context"))
    return Context(size, mesh.get_group("context"))


def build_mesh(world: World, replicate: int) -> DeviceMesh:
    """(world,), or (replicate, shard) where neighbours shard and groups of them repeat the model."""
    if replicate == 1:
        return init_device_mesh(world.device.type, (world.size,))
    sizes = (replicate, world.size // replicate)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def receive(tensors: Iterable[Tensor], world: World) -> None:
    """Put the first process's values into parameters and buffers, in place, on the device.

    What is sharded already is passed over. Drawing weights anew on every process would need as much memory as this
    process wants to save: initialisation draws for whole modules, one after another.
    """
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            continue
        if tensor.is_meta:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
            parameter = isinstance(tensor, nn.Parameter)
            swap_tensors(tensor, nn.Parameter(whole, tensor.requires_grad) if parameter else whole)
        else:  # FSDP2 takes no convolution whose channels are last in memory
            tensor.data = tensor.data.to(world.device).contiguous()
        if world.size > 1:
            dist.broadcast(tensor.data, src=0)


VARIANTS = 64
"""Most variants of a function that are compiled before it is left as it is; torch's 8 are too few for experts, with one
for every number of experts, with gradient and without, and for no, one and many tokens of a modality."""


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile the forward of every block, in place. Blocks of one kind share their code.

    Attention over a layout stays outside (`mm.layers.attention.attend`): its calls follow the lengths of the documents.
    """
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, VARIANTS)
    for block in blocks:
        block.forward = torch.compile(block.forward)


@dataclass(frozen=True)
class Engine:
    """Backward and update under data parallelism.

    FSDP2 averages gradients over the processes; the loss of a process is its share of a global sum, so it is multiplied
    by their number first.

    model: what is called in training
    """

    model: Any
    optimizer: torch.optim.Optimizer
    world: World
    options: OptimOptions

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:
            (loss * self.world.size).backward()

    def step(self) -> tuple[float, bool]:
        """Clip, check and update. Returns the gradient norm before clipping and whether it was finite.

        A step with a non-finite gradient changes nothing.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = float(clip_gradients(parameters, self.options.clip))
        finite = norm == norm and norm not in (float("inf"), float("-inf"))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def held(self) -> dict[MemoryPart, int]:
        """Bytes by part that this process holds on its device all the time."""
        return held_bytes(self.model, self.optimizer, self.world.device)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and optimizer state by name, as checkpoints hold them; all processes ask for it together.

        Tensors are float32, those of parameters and moments sharded by rows.
        """
        return get_state_dict(self.model, self.optimizer, options=BY_NAME)  # type: ignore[return-value]

    def load_state_dict(self, weights: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, here, on other processes or by another engine.

        Options of the optimizer are the recipe's and not those of the saved run.
        """
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=dict(weights),
            optim_state_dict=dict(state),
            options=BY_NAME,
        )
        restore_options(self.optimizer, self.model, self.options)

    def close(self) -> None:
        """Let go of what would keep the model in memory beyond its stage."""
