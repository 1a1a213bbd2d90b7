"""Reading the files of a checkpoint that may come from anyone: numbers and texts come out, nothing is executed.

torch's own reader unpickles the description of a distributed checkpoint, and whatever is no tensor, without limits. A
pickle may name any function of any library and have it called.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
PARTS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *DTYPES),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
}
"""All that the description of a checkpoint is made of, by module."""


class DamagedCheckpoint(ValueError):
    """The description of a checkpoint that cannot be read, or that asks for something else to be called."""


class _Description(pickle.Unpickler):
    """Builds the parts of a description and refuses everything else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in PARTS.get(module_name, ()):
            raise DamagedCheckpoint(f"its description asks for {module_name}.{global_name}, which was not called")
        return super().find_class(module_name, global_name)


class Reader(FileSystemReader):
    """The files of a checkpoint folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            DamagedCheckpoint: it cannot be read, or asks for more than a description needs.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata = _Description(file).load()
            except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
                raise DamagedCheckpoint(f"{self.path} cannot be read: {error}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Reads what is no tensor (the options of the optimizer's groups) as strictly as torch reads tensors."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises if there is more than plain values
        value.seek(0)
        super().load_bytes(read_item, value)
