"""Bounds of the numbers of a recipe: annotations of fields and options that `mm.configure` holds values to.

steps: Annotated[int, Between(1, 10**9)]      `steps: 1e308` is refused with the key, the value and this range
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included; without `low` where `above` is set."""

    low: float
    high: float
    above: bool = False

    def admits(self, value: float) -> bool:
        """Whether a number lies within; not-a-number never does."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {_shown(self.low)}, or .inf for no bound"
        first = f"above {_shown(self.low)} and at most" if self.above else f"from {_shown(self.low)} to"
        return f"{first} {_shown(self.high)}"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


MOST = 2**31 - 1
"""The largest number of anything that is counted in 32 bits."""

WHOLE = Between(-(2**63), 2**63 - 1)
"""Of whole numbers without an annotation."""

FINITE = Between(-sys.float_info.max, sys.float_info.max)
"""Of other numbers without an annotation."""

Count = Annotated[int, Between(1, MOST)]
CountOrNone = Annotated[int, Between(0, MOST)]
"""0 for none."""
Packs = Annotated[int, Between(1, 2**16)]
"""Packs that are held at once."""
Tokens = Annotated[int, Between(1, 2**24)]
"""Tokens of a document or a pack."""
Steps = Annotated[int, Between(1, 10**9)]
Epochs = Annotated[float, Between(0, 1e6, above=True)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Processes = Annotated[int, Between(1, 2**16)]
Share = Annotated[float, Between(0, 1)]
Factor = Annotated[float, Between(0, 1e6)]
"""Factor of a loss, a weight or a rate."""
Rate = Annotated[float, Between(0, 1e3)]
Few = Annotated[int, Between(1, 1024)]
"""Layers, experts of a group."""
Width = Annotated[int, Between(1, 2**20)]
"""Values of a vector, heads, experts: what sizes of weights are made of."""
Vocabulary = Annotated[int, Between(1, 2**24)]
