"""Computing in at least float32: narrow values are widened, and float64 stays float64.

``values.float()`` would round float64 values too, and cap what a float64 model agrees on at 1e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every other dtype."""
    return torch.promote_types(dtype, torch.float32)


def wide(values: Tensor) -> Tensor:
    """Return the values in float32, or as they are in float64."""
    return values.to(wide_dtype(values.dtype))
