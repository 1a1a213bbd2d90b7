"""DeepSpeed's ZeRO as the engine of a run, with the losses and the checkpoints that FSDP2 gives.

    model of the first process ──unit by unit──▶ broadcast ─▶ DeepSpeed: weights in the dtype of compute,
                                                              float32 weights, AdamW and its moments in flat partitions
    checkpoint: rows of every parameter and moment, by name ◀──gathered one after another── partitions

DeepSpeed's own checkpoints hold the flat partitions, which fit the same number of processes, stage and groups only.
What is saved here is what FSDP2 saves, so that either engine goes on from the other's checkpoints.
https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.batchnorm import _BatchNorm

from mm.allow import is_available
from mm.configure import RecipeError
from mm.model.trainable import Trainable
from mm.train.activation import checkpoint_blocks
from mm.train.memory import MemoryPart
from mm.train.muon import fresh_state
from mm.train.optim import OptimOptions, parameter_groups
from mm.train.parallel import Engine, ParallelOptions, World, receive

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_zero(options: ParallelOptions, optim: OptimOptions) -> None:
    """Raise `RecipeError` if DeepSpeed is not installed, or would not do what a recipe asks for."""
    if not is_available("deepspeed"):
        raise RecipeError(
            "parallel.engine is deepspeed, which is not installed: pip install 'mm-pretrain[deepspeed]', or leave it "
            "out to train with FSDP2"
        )
    plain = ParallelOptions()
    refused = {
        "parallel.replicate": options.replicate != plain.replicate,
        "parallel.reshard_after_forward": options.reshard_after_forward != plain.reshard_after_forward,
        "parallel.compile": options.compile,
        "optim.kind: muon": "muon" in (optim.kind, *(part.kind for part in optim.parts)),
        "optim.average": optim.average is not None,
    }
    if found := [name for name, is_asked in refused.items() if is_asked]:
        raise RecipeError(
            f"parallel.engine: deepspeed does without {', '.join(found)}; leave it out, or train with FSDP2 (see "
            "docs/parallel.md)"
        )


@dataclass(frozen=True)
class ZeroEngine(Engine):
    """Backward and update by DeepSpeed.

    DeepSpeed averages gradients over the processes, as FSDP2 does. It sums them over as many backwards as there are,
    since the update is asked for and not counted out (``managed_gradient_accumulation: false``).

    trained: every trained parameter by name, with its group of the optimizer, whose ``updates`` counts
    frozen: every other parameter by name, in float32: this process's rows, in the host's memory
    """

    trained: Mapping[str, tuple[nn.Parameter, dict[str, Any]]]
    frozen: Mapping[str, DTensor]
    mesh: DeviceMesh

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:
            self.model.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        self.model.step()
        finite = self.model.was_step_applied()
        if finite:
            for group in self.optimizer.param_groups:
                group["updates"] += 1
        return float(self.model.get_global_grad_norm()), finite

    def held(self) -> dict[MemoryPart, int]:
        """Nothing is told by part: partitions, their gradients and buffers are DeepSpeed's own."""
        return {}

    @torch.no_grad()
    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        zero = _library().utils
        weights: dict[str, Any] = dict(self.model.module.state_dict()) | dict(self.frozen)
        state: dict[str, Any] = {}
        for name, (parameter, group) in self.trained.items():
            weights[name] = _rows(zero.safe_get_full_fp32_param(parameter), self.mesh)
            state[f"state.{name}.step"] = torch.tensor(float(group["updates"]))
            for key in MOMENTS:
                state[f"state.{name}.{key}"] = _rows(zero.safe_get_full_optimizer_state(parameter, key), self.mesh)
        return weights, state

    def load_state_dict(self, weights: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.load_weights(weights)
        for name, (parameter, _) in self.trained.items():
            for key in MOMENTS:
                whole = state[f"state.{name}.{key}"].full_tensor()
                _library().utils.safe_set_full_optimizer_state(parameter, whole.to(self.world.device), key)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Put float32 weights, and buffers, into the partitions and into what computes."""
        deepspeed = _library()
        for name, parameter in self.model.module.named_parameters():
            whole = weights[name].full_tensor().to(self.world.device)
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.data.copy_(whole)
            if name in self.trained:
                deepspeed.utils.safe_set_full_fp32_param(parameter, whole)
            else:
                self.frozen[name].to_local().copy_(weights[name].to_local())
        for name, buffer in self.model.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def close(self) -> None:
        self.model.destroy()
        _library().runtime.zero.parameter_offload.FWD_MODULE_STACK.clear()  # its first entry is the model


def zero_engine(
    model: Trainable,
    world: World,
    dtype: torch.dtype,
    options: ParallelOptions,
    optim: OptimOptions,
    updates: Mapping[str, int],
) -> ZeroEngine:
    """The engine of a model that is not sharded yet. Other processes than the first may have it on the meta device.

    Args:
        dtype: of compute.
        updates: how often each parameter was updated already, by name; 0 if not named. AdamW corrects its bias by it,
            and a flat partition has one count, so parameters with other counts get groups of their own.
    """
    _check_precision(model, dtype, options)
    deepspeed = _start(world)
    checkpoint_blocks(model.blocks(), options.activations)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = list(_split(parameter_groups(model, optim), names, updates))
    trained = {names[parameter]: (parameter, group) for group in groups for parameter in group["params"]}
    config = zero_config(options, dtype, optim.clip, world)

    mesh = init_device_mesh("cpu", (world.size,))
    waiting, rows = dict(names), {}
    for unit in (*model.blocks(), model):
        own = {parameter: waiting.pop(parameter) for parameter in unit.parameters() if parameter in waiting}
        receive(own, world)
        for parameter, name in own.items():
            if dtype != torch.float32 or name not in trained:
                rows[name] = _rows(parameter.detach(), mesh)
            parameter.data = parameter.data.to(dtype)
        if options.zero == 3:
            deepspeed.zero.Init(unit, config_dict_or_path=config, dtype=dtype)
    receive(model.buffers(), world)

    optimizer = torch.optim.AdamW(groups, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    _materialise(engine.optimizer, optimizer, options.zero)
    if options.zero == 3:
        _gather_by_unit(model)
    frozen = {name: tensor for name, tensor in rows.items() if name not in trained}
    zero = ZeroEngine(engine, optimizer, world, optim, trained, frozen, mesh)
    if dtype != torch.float32:
        zero.load_weights(rows)  # the partitions were made from weights in 16 bits
    return zero


def zero_config(options: ParallelOptions, dtype: torch.dtype, clip: float, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration, see https://www.deepspeed.ai/docs/config-json."""
    stage: dict[str, Any] = {"stage": options.zero}
    if options.zero == 3:  # both put functions of their own in the place of torch's, for the whole process
        stage |= {"memory_efficient_linear": False, "override_module_apply": False}
    if options.offload:
        stage |= {"offload_optimizer": {"device": "cpu", "pin_memory": world.device.type == "cuda"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip if clip != float("inf") else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,  # torch has a fused AdamW for CPUs too, and it needs no compiler
    }


def _check_precision(model: Trainable, dtype: torch.dtype, options: ParallelOptions) -> None:
    """Raise `RecipeError` for what DeepSpeed would compute in 16 bits and FSDP2 does not."""
    if dtype == torch.float32:
        return
    if options.zero == 1:
        raise RecipeError(
            "parallel.zero is 1, and DeepSpeed would sum its gradients in 16 bits; choose `zero: 2`, or precision: fp32"
        )
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        raise RecipeError(
            f"DeepSpeed would compute {len(norms)} BatchNorms in 16 bits, such as {norms[0]}; set `fold: true` in that "
            "encoder, precision: fp32, or train with FSDP2"
        )


def _library() -> Any:
    """deepspeed, which is an extra and takes seconds to import."""
    return import_module("deepspeed")


def _start(world: World) -> Any:
    """The library, told of the device and of a process that no launcher started, and to log warnings only."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = _library()
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # it would compile collectives for CPUs, for minutes
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def _split(
    groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str], updates: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """The groups, in parts whose parameters were updated equally often, which ``updates`` says."""
    for group in groups:
        by_updates: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_updates.setdefault(updates.get(names[parameter], 0), []).append(parameter)
        for count, parameters in by_updates.items():
            yield group | {"params": parameters, "updates": count}


def _materialise(zero: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
    """Create the moments of every flat partition, which DeepSpeed leaves to the first update."""
    groups = optimizer.param_groups
    if stage == 3:
        partitions = zero.fp32_partitioned_groups_flat  # of a group there may be several
        groups = [groups[zero.sub_group_to_group_id[number]] for number in range(len(partitions))]
    else:
        partitions = zero.single_partition_of_fp32_groups
    for partition, group in zip(partitions, groups, strict=True):
        optimizer.state[partition] |= fresh_state(partition, group)
        optimizer.state[partition]["step"].fill_(group["updates"])
    if stage != 3:
        zero._lazy_init_hp_params_optimizer_state()  # shows each parameter its part of them, as the first update would


def _gather_by_unit(model: Trainable) -> None:
    """Let stage 3 gather a block as a whole, and the rest with the model, as FSDP2 does.

    By itself it gathers what is a module's own when that module is called. Weights that others read (a tied head,
    position embeddings) would have to be found out, anew in every part of the model that only some batches use.
    """
    register = _library().zero.register_external_parameter
    blocks = model.blocks()
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        for parameter in block.parameters():
            register(block, parameter)
    for parameter in model.parameters():
        if parameter not in in_blocks:
            register(model, parameter)


def _rows(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's rows of a tensor that all of them have, in float32 in the host's memory."""
    chunks = whole.chunk(mesh.size())
    rank = mesh.get_local_rank()
    own = chunks[rank] if rank < len(chunks) else whole[:0]
    own = own.to("cpu", torch.float32, copy=True).contiguous()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
