"""What checkpoints there are, and whether all that one should hold can be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mm.model.build import build_trainable
from mm.train import checkpoint
from mm.train.checkpoint import POSITION, CheckpointError
from mm.train.export import recipe_of
from mm.train.reading import DamagedCheckpoint, Reader

AT_ONCE = 1 << 30
"""Bytes of tensors that are read in one go."""


def table_of(run: Path) -> Table:
    """Checkpoints of a run, oldest first, and those that were left half-written.

    Raises:
        CheckpointError: the run has none.
    """
    folders = sorted(
        [*(run / "checkpoints").glob("step-*"), *(run / "checkpoints").glob(".step-*.partial")],
        key=lambda path: path.name.lstrip("."),
    )
    if not folders:
        raise CheckpointError(f"{run} has no checkpoints; a run folder has them in checkpoints/step-…")
    table = Table("step", "stage", "size", "date", "complete")
    for folder in folders:
        step = int(folder.name.lstrip(".").removeprefix("step-").removesuffix(".partial"))
        complete = (folder / POSITION).exists() and not folder.name.startswith(".")
        stage = str(len(checkpoint.read_position(folder).finished)) if complete else ""
        size = sum(path.stat().st_size for path in folder.iterdir())
        date = datetime.fromtimestamp(folder.stat().st_mtime).isoformat(" ", "seconds")
        table.add_row(f"{step:,}", stage, f"{size / 1e6:,.1f} MB", date, "yes" if complete else "no, never loaded")
    return table


@dataclass(frozen=True)
class Verified:
    """What reading a checkpoint found: a sentence for everything that is wrong, and how much was looked at.

    entries: tensors, and options of the optimizer
    size: bytes of all files
    """

    findings: tuple[str, ...]
    entries: int
    size: int


def verify(path: Path) -> Verified:
    """Read all of a checkpoint.

    What is wrong is a finding, be it a file that is missing or too short, an entry that cannot be read, a value that is
    not finite, or a parameter whose name or shape is not that of the run's recipe.

    Raises:
        CheckpointError: it is incomplete, or its description cannot be read.
    """
    checkpoint.read_position(path)
    try:
        metadata = Reader(path).read_metadata()
    except DamagedCheckpoint as error:
        raise CheckpointError(str(error)) from error
    findings = list(_differences(path))
    unreadable = _out_of_files(path, metadata)
    findings += [f"{file}: {what}" for file, (what, _) in unreadable.items()]
    lost = {name for _, names in unreadable.values() for name in names}
    for names in _groups(metadata, lost):
        findings += _read(path, {name: metadata.state_dict_metadata[name] for name in names})
    size = sum(file.stat().st_size for file in path.iterdir())
    return Verified(tuple(findings), len(metadata.state_dict_metadata), size)


def _differences(path: Path) -> Iterator[str]:
    """How the parameters differ from those of the recipe."""
    try:
        checkpoint.check_architecture(path, build_trainable(recipe_of(path).model, meta=True))
    except CheckpointError as error:
        yield str(error)


def _out_of_files(path: Path, metadata: Metadata) -> dict[str, tuple[str, set[str]]]:
    """Files that end before what they hold does: what is wrong with each, and names of the entries lost with it."""
    ends: dict[str, int] = defaultdict(int)
    names: dict[str, set[str]] = defaultdict(set)
    for index, place in (metadata.storage_data or {}).items():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
        names[place.relative_path].add(index.fqn)
    wrong = {}
    for file, end in ends.items():
        rank = file.removeprefix("__").partition("_")[0]
        if not (path / file).exists():
            wrong[file] = f"missing, it held what rank {rank} saved, such as {min(names[file])}", names[file]
        elif (path / file).stat().st_size < end:
            length = (path / file).stat().st_size
            wrong[file] = f"{length:,} bytes of at least {end:,}; rank {rank} saved it", names[file]
    return wrong


def _groups(metadata: Metadata, lost: set[str]) -> Iterator[list[str]]:
    """Names of the entries that are not lost, so many at once as are to be held in memory."""
    group: list[str] = []
    held = 0
    for name, entry in metadata.state_dict_metadata.items():
        if name in lost:
            continue
        group.append(name)
        held += entry.size.numel() * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0
        if held > AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group


def _read(path: Path, entries: Mapping[str, Any]) -> Iterator[str]:
    """Findings of reading some entries together, or half of them at a time as long as that fails."""
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in entries.items()
    }
    try:
        checkpoint.load_alone(state, path)
    except CheckpointError as error:
        if len(entries) == 1:
            yield f"{next(iter(entries))}: {checkpoint.root_cause(error.__cause__ or error)}"
            return
        names = list(entries)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            yield from _read(path, {name: entries[name] for name in half})
        return
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            broken = tensor.numel() - int(torch.isfinite(tensor).sum())
            if broken:
                yield f"{name}: {broken:,} of {tensor.numel():,} values are not finite"
