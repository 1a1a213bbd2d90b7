"""Checkpoints: complete or invisible, loadable by any number of processes.

    RUN/checkpoints/step-00000200/   torch.distributed.checkpoint files, then `position.json`
    RUN/checkpoints/.step-00000200.partial   while it is being written; never loaded, removed when the run goes on

A checkpoint counts once its folder has its final name, which it gets by one rename after everything was flushed.
`mm.train.saving` writes them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mm.model.upcycle import NotUpcyclable, upcycle
from mm.train.average import AVERAGE, UPDATES
from mm.train.parallel import Engine, World
from mm.train.reading import DamagedCheckpoint, Planner, Reader

POSITION = "position.json"
WEIGHTS = "model.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or of another architecture; the message says which and what to do."""


class Finished(NamedTuple):
    """The end of a stage: steps of the run until then, and packs of the stage's plan."""

    step: int
    packs: int


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that resuming needs beside weights, optimizer state and the plan in the run's folder.

    step: updates done
    packs: packs of the stage's plan consumed
    tokens: real tokens seen
    plan: fingerprint of the plan that the packs were numbered by
    finished: the stages before this one
    passed_over: of the packs, those that the guard has passed over, see `mm.train.guard`
    rewinds: how often it has, in this stage
    """

    step: int
    packs: int
    tokens: int
    plan: str
    finished: tuple[Finished, ...] = ()
    passed_over: int = 0
    rewinds: int = 0

    @classmethod
    def read(cls, text: str) -> Self:
        """From JSON."""
        values = json.loads(text)
        return cls(**values | {"finished": tuple(Finished(*stage) for stage in values["finished"])})


def load(path: Path, engine: Engine, *, next_stage: bool = False) -> Position:
    """Load weights and optimizer state in place, whatever the number of processes, or the engine, that saved them.

    Args:
        next_stage: other parameters may train than in the checkpoint, by another optimizer. What was not saved keeps
            the state it has.

    Raises:
        CheckpointError: weights or, within a stage, optimizer state are missing or of another shape.
    """
    position = read_position(path)
    model_state, optimizer_state = engine.state_dict()
    _check_names(path, model_state)
    saved = Reader(path).read_metadata().state_dict_metadata
    loadable = {name: value for name, value in optimizer_state.items() if f"optimizer.{name}" in saved}
    if not next_stage:
        _check_optimizer(path, optimizer_state.keys() - loadable.keys())
    state = {"model": model_state, "optimizer": loadable}
    try:
        dcp.load(state, storage_reader=Reader(path), planner=Planner())
    except dcp.CheckpointException as error:
        raise CheckpointError(
            f"{path} does not fit this recipe, or is damaged: {root_cause(error)}. `mm checkpoint verify` tells which; "
            "without the folder the run goes on from the checkpoint before"
        ) from error
    optimizer_state |= loadable
    engine.load_state_dict(model_state, optimizer_state)
    return position


def load_weights(path: Path, model: nn.Module) -> None:
    """Load weights only, from a checkpoint or an export, into an unsharded model.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape; all are named.
    """
    wanted = model.state_dict()
    if (path / WEIGHTS).exists():
        try:
            found = load_file(path / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(f"{path / WEIGHTS} is damaged or no safetensors file: {error}") from error
        _compare(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, _shapes(_untied(wanted)))
        model.load_state_dict(found, strict=False)  # tied tensors are stored once
        return
    read_position(path)
    _check_names(path, wanted)
    load_alone({"model": wanted}, path)
    model.load_state_dict(wanted)


def fits(path: Path, model: nn.Module) -> bool:
    """Whether a checkpoint's parameters are those of a model."""
    try:
        check_architecture(path, model)
    except CheckpointError:
        return False
    return True


def load_beginning(path: Path, model: nn.Module) -> bool:
    """Load weights of the same architecture, or of a smaller one that grows into the model, into an unsharded model.

    Returns:
        Whether they grew.

    Raises:
        CheckpointError: as `load_weights`, and `mm.model.upcycle` has no rule for the difference.
    """
    try:
        load_weights(path, model)
    except CheckpointError as error:
        try:
            upcycle(_read_weights(path), model)
        except NotUpcyclable as reason:
            raise CheckpointError(f"{error}\nIt cannot be upcycled either:\n{reason}") from error
        return True
    return False


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint or an export, by name."""
    if (path / WEIGHTS).exists():
        return load_file(path / WEIGHTS)
    found = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in Reader(path).read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    load_alone({"model": found}, path)
    return found


def load_averages(path: Path, model: nn.Module) -> None:
    """Put the averages of a checkpoint in the place of the parameters that have one, in an unsharded model.

    Raises:
        CheckpointError: it has none.
    """
    saved = Reader(path).read_metadata().state_dict_metadata if (path / POSITION).exists() else {}
    wanted = {f"state.{name}.{AVERAGE}": parameter.data for name, parameter in model.named_parameters()}
    averages = {name: tensor for name, tensor in wanted.items() if f"optimizer.{name}" in saved}
    if not averages:
        raise CheckpointError(
            f"{path} holds no averages: they are in the checkpoints of runs whose recipe has `optim.average`"
        )
    load_alone({"optimizer": averages}, path)


def load_mean(paths: Sequence[Path], model: nn.Module) -> None:
    """Load the mean of the weights of several checkpoints into an unsharded model (Vaswani et al. 2017, section 6.1).

    What is no floating-point number is taken from the last.

    Raises:
        CheckpointError: as `load_weights`, for any of them.
    """
    mean: dict[str, Tensor] = {}
    for count, path in enumerate(paths, 1):
        load_weights(path, model)
        for name, tensor in model.state_dict().items():
            if count == 1 or not tensor.is_floating_point():
                mean[name] = tensor.clone()
            else:
                mean[name].lerp_(tensor, 1 / count)
    model.load_state_dict(mean)


def export_weights(path: Path, model: nn.Module, world: World | None = None) -> None:
    """Write all weights as one safetensors file, atomically; every process takes part, the first writes."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world is not None and not world.is_first:
        return
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{WEIGHTS}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in _untied(state).items()}, partial)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path / WEIGHTS}: {error}") from error
    partial.replace(path / WEIGHTS)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def newest(run: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, oldest first.

    Raises:
        CheckpointError: it has fewer.
    """
    complete = complete_checkpoints(run / "checkpoints")
    if not 1 <= count <= len(complete):
        raise CheckpointError(
            f"{run} has {len(complete)} checkpoints and {count} were asked for; `save_every` and `keep` of its recipe "
            "say how many there are"
        )
    return complete[-count:]


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints below a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / POSITION).exists())


def find(path: str | Path) -> Path:
    """The weights that a path means: an export, a checkpoint, or a run folder's newest checkpoint."""
    path = Path(path).expanduser()
    if (path / WEIGHTS).exists() or (path / POSITION).exists():
        return path
    last = latest(path / "checkpoints")
    if last is None:
        raise CheckpointError(
            f"no weights in {path}: expected an export ({WEIGHTS}), a checkpoint ({POSITION}) or a run folder with "
            "checkpoints/"
        )
    return last


def read_position(path: Path) -> Position:
    try:
        return Position.read((path / POSITION).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {POSITION}") from None


def read_updates(path: Path) -> dict[str, int]:
    """How often AdamW has updated each parameter that it trained, by name."""
    names = [
        name.removeprefix("optimizer.")
        for name in Reader(path).read_metadata().state_dict_metadata
        if name.startswith("optimizer.state.") and name.endswith(".step")
    ]
    counts = {name: torch.zeros(()) for name in names}
    load_alone({"optimizer": counts}, path)
    return {name.removeprefix("state.").removesuffix(".step"): int(count) for name, count in counts.items()}


def load_alone(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of a state, without other processes.

    Raises:
        CheckpointError: a file of it is missing or damaged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `no_dist` asks for
        try:
            dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=True)
        except dcp.CheckpointException as error:
            raise CheckpointError(
                f"{path} cannot be read: {root_cause(error)}. `mm checkpoint verify` names all that is wrong with it"
            ) from error


def _check_optimizer(path: Path, missing: Iterable[str]) -> None:
    """Raise if state is missing that only updates can make. Options are the recipe's, and an average may begin late."""
    lacking = sorted(
        name for name in missing if name.startswith("state.") and name.rpartition(".")[2] not in (AVERAGE, UPDATES)
    )
    if lacking:
        raise CheckpointError(
            f"{path} does not fit this recipe: it lacks {len(lacking)} entries of the optimizer's state, such as "
            f"{lacking[0]!r}. If optim.kind or what trains has changed, add a stage that says so, or start a new run "
            "with init_from"
        )


def check_architecture(path: Path, model: nn.Module) -> None:
    """Raise `CheckpointError` with the names of all parameters that differ, before anything is indexed or planned."""
    _check_names(path, model.state_dict())


def _check_names(path: Path, state: dict) -> None:
    try:
        metadata = Reader(path).read_metadata().state_dict_metadata
    except DamagedCheckpoint as error:
        raise CheckpointError(str(error)) from error
    found = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    _compare(path, found, _shapes(state))


def _compare(path: Path, found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raise with the names of all parameters that differ."""
    differences = [
        f"  missing in the checkpoint: {name} {wanted[name]}" for name in sorted(wanted.keys() - found.keys())
    ]
    differences += [f"  unknown to the model: {name} {found[name]}" for name in sorted(found.keys() - wanted.keys())]
    differences += [
        f"  {name}: {found[name]} in the checkpoint, {wanted[name]} in the model"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    if differences:
        shown = "\n".join(
            differences[:12] + ([f"  … and {len(differences) - 12} more"] if len(differences) > 12 else [])
        )
        raise CheckpointError(f"{path} is of another architecture than the recipe's model:\n{shown}")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _untied(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state without second names of the same storage."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            unique[name] = tensor
            seen.add(tensor.data_ptr())
    return unique


def root_cause(error: BaseException) -> str:
    """The first exception below torch's wrapper, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
