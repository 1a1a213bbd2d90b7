"""The optimizer of a run: which parameters train, at which rate, with which decay.

    model + OptimOptions ──freeze──▶ requires_grad ──(sharding)──▶ build_optimizer ──▶ AdamW or Muon with its groups
                                                                   materialise_state, before the first save or load

A `part` of the recipe is a pattern on parameter names; the first that matches a parameter decides on it:

    parts: [{match: "^decoder\\.", freeze: true}, {match: "^encoders\\.", lr: 1e-4, layer_decay: 0.8}]
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm.bounds import Between, Rate, Share
from mm.configure import RecipeError
from mm.encoders.base import Encoder
from mm.layers.precision import wide
from mm.model.decoder import Decoder
from mm.train.average import AVERAGE, AverageOptions, begin_averages, fresh_average, update_averages
from mm.train.muon import Muon, fresh_state

Kind = Literal["adamw", "muon"]

WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")
"""What activation checkpointing and torch.compile put into parameter names; patterns are written without it."""


@dataclass
class Part:
    """Parameters whose name contains a match of a regular expression, and what differs for them.

    match: regular expression, searched in names such as ``decoder.blocks.0.attention.query.weight``
    freeze: do not train them
    lr: their peak learning rate (absolute), instead of the recipe's
    weight_decay: instead of the recipe's, for those of them that decay at all
    kind: instead of the recipe's, for those of them that Muon takes at all
    layer_decay: γ, by which the rate falls with every layer below the top of a tower: lr · γ^(L − i), where i counts
        the L blocks from 1, what comes before them is layer 0, and what follows belongs to the last. As timm counts;
        BEiT (Bao et al. 2022) and MAE (He et al. 2022, table 9) count the head as one layer more
    """

    match: str
    freeze: bool = False
    lr: Rate | None = None
    weight_decay: Rate | None = None
    kind: Kind | None = None
    layer_decay: Share | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise RecipeError(f"optim.parts: {self.match!r} is no regular expression: {error}") from None
        _require(self.lr is None or self.lr >= 0, f"parts: lr of {self.match!r}", self.lr, "at least 0")
        _require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"parts: layer_decay of {self.match!r}",
            self.layer_decay,
            "above 0 and at most 1",
        )


@dataclass
class OptimOptions:
    """`optim:` of a recipe, see docs/optim.md.

    kind: adamw (Loshchilov and Hutter 2019), or muon for the matrices of blocks and adamw for the rest
    lr: peak learning rate, which the schedule multiplies; one that is right for adamw is right for muon
    betas, eps: of adamw
    momentum: of muon
    clip: largest norm of the global gradient; larger ones are scaled down to it
    parts: exceptions, see `Part`; the first whose pattern matches wins
    average: keep a moving average of the weights as well
    """

    kind: Kind = "adamw"
    lr: Rate = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Share = 1e-8
    momentum: Share = 0.95
    weight_decay: Rate = 0.1
    clip: Annotated[float, Between(0, math.inf, above=True)] = 1.0
    parts: list[Part] = field(default_factory=list)
    average: AverageOptions | None = None

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "lr", self.lr, "at least 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "at least 0 and below 1, both")
        _require(self.eps >= 0, "eps", self.eps, "at least 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.clip > 0, "clip", self.clip, "positive; .inf turns clipping off")


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise RecipeError(f"optim.{name} is {value} and must be {allowed}")


def freeze(model: nn.Module, options: OptimOptions) -> None:
    """Stop the training of the parameters that the options freeze, in place.

    Nothing is ever unfrozen: an encoder's fixed tables stay fixed. A stage that trains more starts from a fresh model.

    Raises:
        RecipeError: a part decides on no parameter; says why and which parameters there are.
    """
    for _, parameter, part in _assign_parts(model, options):
        if part is not None and part.freeze:
            parameter.requires_grad_(False)


def build_optimizer(
    model: nn.Module, options: OptimOptions, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW | Muon:
    """The optimizer of the trainable parameters, fused where the device has it. `freeze` and shard the model first.

    Groups carry ``part`` (the pattern, or "" for the rest), ``kind``, ``peak_lr`` and `weight_decay`. Only matrices
    that multiply activations decay. Vectors (norms, biases, gates, class tokens) do not; neither do embedding tables,
    with the head if it is tied to one, because AdamW decays also the rows of tokens that do not occur and would slowly
    erase what a pretrained model knows of rare ones; nor what a module names in timm's ``no_weight_decay()``.

    Muon takes the matrices that decay in the blocks of encoders and decoder, except routers. Where it takes none, what
    is built is torch's AdamW.

    Args:
        dtype: of compute.

    Raises:
        RecipeError: a part decides on no parameter, or nothing is left to train.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise RecipeError("optim.parts freezes every parameter of the model: there is nothing to train")
    fusable = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    if any(group["kind"] == "muon" for group in groups):
        optimizer = Muon(groups, fusable, dtype)
    else:
        optimizer = torch.optim.AdamW(groups, fused=fusable or None)
    if (average := options.average) is not None:
        optimizer.register_step_post_hook(lambda optimizer, *_: update_averages(optimizer, average))
    return optimizer


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Groups for `torch.optim.Optimizer`: parameters with the same options, in the model's order of parameters.

    The order of groups and of parameters depends on the model and the options only, so it is the same on every rank.
    """
    undecayed, layers = _undecayed(model), _layers(model)
    for_muon = {one: count for one, count in _matrices_of_blocks(model).items() if one not in undecayed}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter, part in _assign_parts(model, options):
        if not parameter.requires_grad:
            continue
        part = part or Part("")
        if part.freeze:
            raise ValueError(f"{name} is to be frozen and still trains; call freeze(model, options) first")
        lr = options.lr if part.lr is None else part.lr
        decay = options.weight_decay if part.weight_decay is None else part.weight_decay
        if part.layer_decay is not None:
            if parameter not in layers:
                raise RecipeError(
                    f"optim.parts: {part.match!r} has a layer_decay, and {name} is in no encoder or decoder with blocks"
                )
            layer, top = layers[parameter]
            lr *= part.layer_decay ** (top - layer)
        group = {
            "part": part.match,
            "kind": (part.kind or options.kind) if parameter in for_muon else "adamw",
            "peak_lr": lr,
            "weight_decay": 0.0 if parameter in undecayed else decay,
            "matrices": for_muon.get(parameter, 1),
        }
        common = {"lr": lr, "betas": options.betas, "eps": options.eps, "momentum": options.momentum}
        groups.setdefault(tuple(group.values()), {"params": [], **group, **common})["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak learning rate (see `mm.train.schedule.learning_rate_factor`)."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def restore_options(optimizer: torch.optim.Optimizer, model: nn.Module, options: OptimOptions) -> None:
    """Give the groups the options' values again, after a load has overwritten them with those of the saved run.

    Loading the state of an optimizer restores learning rates, betas and decay beside the moments, so that a run resumed
    with a lower `optim.lr` would silently go on with the old one. (A recipe that also groups its parameters otherwise
    can load only what was saved with ``flatten_optimizer_state_dict=True``.) An average that begins now, begins at the
    parameters that were loaded.
    """
    for group, fresh in zip(optimizer.param_groups, parameter_groups(model, options), strict=True):
        group.update({key: value for key, value in fresh.items() if key != "params"})
    begin_averages(optimizer)


def materialise_state(optimizer: torch.optim.Optimizer, options: OptimOptions) -> None:
    """Create the state of every parameter as the first step would, without taking one.

    AdamW makes the state of a parameter when it first sees its gradient. A parameter without one so far (the adapter of
    a modality that has not occurred) would be missing in a checkpoint, and a strict load would refuse it. Of an
    optimizer with no state at all, `torch.distributed.checkpoint.state_dict` takes a step at rate 0 to get one, which
    leaves the count of steps at 1 and so another bias correction for the whole run.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state |= fresh_state(parameter, group)
            if options.average is not None and AVERAGE not in state:
                state |= fresh_average(parameter)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients, in place, so that their global norm is at most `max_norm`.

    Under FSDP2 gradients are DTensors, and the norm is that of the whole model and the same on every rank. Plain
    parameters may stand beside them, such as a part that is not sharded and has the same gradient on every rank.

    Returns:
        () norm before clipping in at least float32; a plain tensor, not finite if any gradient is not.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)  # torch mixes neither meshes nor DTensors and tensors
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    if not by_mesh:
        return torch.zeros(())
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack([wide(_full(norm)) for norm in norms]))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _assign_parts(model: nn.Module, options: OptimOptions) -> Iterator[tuple[str, nn.Parameter, Part | None]]:
    """Every parameter with its name and the first part that matches it, or None.

    Raises:
        RecipeError: a part gets no parameter. A freeze that does nothing is found out after the run otherwise.
    """
    named = [(WRAPPERS.sub("", name), parameter) for name, parameter in model.named_parameters()]
    assigned = [next((part for part in options.parts if re.search(part.match, name)), None) for name, _ in named]
    for part in options.parts:
        if any(part is winner for winner in assigned):
            continue
        if any(re.search(part.match, name) for name, _ in named):
            raise RecipeError(f"optim.parts: earlier parts match everything that {part.match!r} matches; put it first")
        raise RecipeError(f"optim.parts: {part.match!r} matches no parameter; there are {_overview(named)}")
    return ((name, parameter, part) for (name, parameter), part in zip(named, assigned, strict=True))


def _overview(named: list[tuple[str, nn.Parameter]]) -> str:
    """``decoder.* (290), adapters.* (4)``: the model's children with their numbers of parameters."""
    counts = Counter(name.split(".")[0] + (".*" if "." in name else "") for name, _ in named)
    return ", ".join(f"{child} ({count})" for child, count in counts.items())


def _undecayed(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that never decay, see `build_optimizer`."""
    undecayed = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding) or sum(size > 1 for size in parameter.shape) < 2:
                undecayed.add(parameter)
        declared: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
        if declared is not None:
            names = set(declared())
            undecayed.update(parameter for name, parameter in module.named_parameters() if name in names)
    return undecayed


def _matrices_of_blocks(model: nn.Module) -> dict[nn.Parameter, int]:
    """Two-dimensional parameters of the repeated blocks of encoders and decoder, without those of routers, and how many
    matrices lie below each other in each: experts say so in `stacked`."""
    blocks = [block for tower in _towers(model) for block in tower.blocks()]
    stacked = {
        module.get_parameter(name): count
        for block in blocks
        for module in block.modules()
        for name, count in getattr(module, "stacked", dict)().items()
    }
    return {
        parameter: stacked.get(parameter, 1)
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and "router" not in name.split(".")
    }


def _layers(model: nn.Module) -> dict[nn.Parameter, tuple[int, int]]:
    """(i, L) of every parameter in a tower with blocks, see `Part`.

    A tower declares its modules in the order in which they compute, and tokens and positions of its own before them.
    """
    layers = {}
    for tower in _towers(model):
        blocks = tower.blocks()
        number = {parameter: i for i, block in enumerate(blocks, 1) for parameter in block.parameters()}
        layer = 0
        for parameter in tower.parameters() if blocks else ():
            layer = number.get(parameter, layer)
            layers[parameter] = (layer, len(blocks))
    return layers


def _towers(model: nn.Module) -> Iterator[Encoder | Decoder]:
    return (module for module in model.modules() if isinstance(module, Encoder | Decoder))
