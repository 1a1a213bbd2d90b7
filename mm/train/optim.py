"""The optimizer of a run: which parameters train, at which rate, with which decay.

    model + OptimOptions ──freeze──▶ requires_grad ──(sharding)──▶ build_optimizer ──▶ AdamW with parameter groups
                                                                   materialise_state, before the first save or load

A `part` of the recipe is a pattern on parameter names; the first that matches a parameter decides on it:

    parts: [{match: "^decoder\\.", freeze: true}, {match: "^adapters\\.", lr: 1e-3}]
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm.configure import RecipeError

WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")
"""What activation checkpointing and torch.compile put into parameter names; patterns are written without it."""


@dataclass
class Part:
    """Parameters whose name contains a match of a regular expression, and what differs for them.

    match: regular expression, searched in names such as ``decoder.blocks.0.attention.query.weight``
    freeze: do not train them
    lr: their peak learning rate (absolute), instead of the recipe's
    weight_decay: instead of the recipe's, for those of them that decay at all
    """

    match: str
    freeze: bool = False
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise RecipeError(f"optim.parts: {self.match!r} is no regular expression: {error}") from None


@dataclass
class OptimOptions:
    """`optim:` of a recipe: AdamW (Loshchilov and Hutter 2019).

    lr: peak learning rate, which the schedule multiplies
    clip: largest norm of the global gradient; larger ones are scaled down to it
    parts: exceptions, see `Part`; the first whose pattern matches wins
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise RecipeError(f"optim.clip is {self.clip} and must be positive; .inf turns clipping off")


def freeze(model: nn.Module, options: OptimOptions) -> None:
    """Stop the training of the parameters that the options freeze, in place.

    Nothing is ever unfrozen: an encoder's fixed tables stay fixed. A stage that trains more starts from a fresh model.

    Raises:
        RecipeError: a part decides on no parameter; says why and which parameters there are.
    """
    for _, parameter, part in _assign_parts(model, options):
        if part is not None and part.freeze:
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused where the device has it. Call `freeze` and shard the model first.

    Groups carry ``part`` (the pattern, or "" for the rest), ``peak_lr`` and `weight_decay`. Only matrices that multiply
    activations decay. Vectors (norms, biases, gates, class tokens) do not; neither do embedding tables, with the head
    if it is tied to one, because AdamW decays also the rows of tokens that do not occur and would slowly erase what a
    pretrained model knows of rare ones; nor what a module names in timm's ``no_weight_decay()``.

    Raises:
        RecipeError: a part decides on no parameter, or nothing is left to train.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise RecipeError("optim.parts freezes every parameter of the model: there is nothing to train")
    fusable = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=fusable or None)


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Groups for `torch.optim.Optimizer`, one per part and per whether it decays, in the model's order of parameters.

    The order of groups and of parameters depends on the model and the options only, so it is the same on every rank.
    """
    undecayed = _undecayed(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter, part in _assign_parts(model, options):
        if not parameter.requires_grad:
            continue
        if part is not None and part.freeze:
            raise ValueError(f"{name} is to be frozen and still trains; call freeze(model, options) first")
        decays = parameter not in undecayed
        lr = options.lr if part is None or part.lr is None else part.lr
        decay = options.weight_decay if part is None or part.weight_decay is None else part.weight_decay
        group = {"part": part.match if part else "", "lr": lr, "peak_lr": lr, "weight_decay": decay if decays else 0.0}
        groups.setdefault((group["part"], decays), {"params": [], **group})["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak learning rate (see `mm.train.schedule.learning_rate_factor`)."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def restore_options(optimizer: torch.optim.Optimizer, model: nn.Module, options: OptimOptions) -> None:
    """Give the groups the options' values again, after a load has overwritten them with those of the saved run.

    Loading the state of an optimizer restores learning rates, betas and decay beside the moments, so that a run resumed
    with a lower `optim.lr` would silently go on with the old one. (A recipe that also groups its parameters otherwise
    can load only what was saved with ``flatten_optimizer_state_dict=True``.)
    """
    for group, fresh in zip(optimizer.param_groups, parameter_groups(model, options), strict=True):
        group.update({key: value for key, value in fresh.items() if key != "params"})
        group.update(betas=options.betas, eps=options.eps)


def materialise_state(optimizer: torch.optim.AdamW) -> None:
    """Create the state of every parameter as AdamW's first step would, without taking one.

    AdamW makes the state of a parameter when it first sees its gradient. A parameter without one so far (the adapter of
    a modality that has not occurred) would be missing in a checkpoint, and a strict load would refuse it. Of an
    optimizer with no state at all, `torch.distributed.checkpoint.state_dict` takes a step at rate 0 to get one, which
    leaves the count of steps at 1 and so another bias correction for the whole run.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            # The fused kernel counts steps on the device, in a plain tensor even where the moments are DTensors.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients, in place, so that their global norm is at most `max_norm`.

    Under FSDP2 gradients are DTensors, and the norm is that of the whole model and the same on every rank. Plain
    parameters may stand beside them, such as a part that is not sharded and has the same gradient on every rank.

    Returns:
        () float32 norm before clipping; a plain tensor, not finite if any gradient is not.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)  # torch mixes neither meshes nor DTensors and tensors
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    if not by_mesh:
        return torch.zeros(())
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack([_full(norm).float() for norm in norms]))
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
