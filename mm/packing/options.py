"""The recipe's `packing:` section."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from mm.bounds import Between, Count, CountOrNone, Packs, Tokens
from mm.packing.fit import POLICIES

TOO_LONG = ("drop", "truncate")

MOST_PACKS = 2**16
"""Of a global batch."""


@dataclass(frozen=True)
class PackingOptions:
    """How samples become packs.

    capacity: most tokens in a pack
    limits: most items in a pack by quantity, such as ``{image: 16}``; what is not named has no limit
    batch: packs in a global batch; None if `batch_tokens` is given
    batch_tokens: tokens in a global batch, rounded to whole packs
    window: packs that are planned at a time, about: a window takes this many times `capacity` tokens from the sources.
        Larger windows fill a little better and shuffle wider; the first step waits for one window
    alike: this many packs in a row are alike in what they cost the encoders and the decoder, so that as many GPUs that
        work on one each wait little for each other. A batch should hold several such groups, or it is of one kind; 1
        for packs in random order. See `mm.packing.balance.side_by_side`
    shuffle_shards: shards whose rows are shuffled together. Reads stay within this many shards a source
    too_long: what happens to a sample with more tokens than `capacity`: ``drop`` it, or ``truncate`` its text at the
        end if no media item is cut by that, and else drop it
    policy: ``best-fit``; ``first-fit-decreasing``, the textbook's; ``in-order`` (next-fit) and ``next-8-fit`` for
        curricula, which keep the order in which shards hold their samples; or ``one-per-pack`` (no packing)
    """

    capacity: Tokens = 4096
    limits: dict[str, CountOrNone] = field(default_factory=dict)
    batch: Packs | None = 64
    batch_tokens: Annotated[int, Between(1, 2**40)] | None = None
    window: Packs = 2048
    alike: Packs = 1
    shuffle_shards: Count = 8
    too_long: str = "drop"
    policy: str = "best-fit"

    def __post_init__(self) -> None:
        for name in ("capacity", "window", "alike", "shuffle_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"packing.{name} must be at least 1, not {getattr(self, name)}")
        for name, limit in self.limits.items():
            if limit < 0:
                raise ValueError(f"packing.limits.{name} must be at least 0, not {limit}")
        if (self.batch is None) == (self.batch_tokens is None):
            raise ValueError(
                f"give one of packing.batch and packing.batch_tokens, the other null; "
                f"they are {self.batch} and {self.batch_tokens}"
            )
        if (self.batch or self.batch_tokens or 0) < 1:
            raise ValueError("packing.batch and packing.batch_tokens must be at least 1")
        if self.packs_per_batch > MOST_PACKS:
            raise ValueError(
                f"packing.batch_tokens is {self.batch_tokens:,}, which is {self.packs_per_batch:,} packs of "
                f"packing.capacity {self.capacity:,}; a global batch has at most {MOST_PACKS:,} packs"
            )
        if self.alike > self.packs_per_batch:
            raise ValueError(
                f"packing.alike is {self.alike} and a global batch has {self.packs_per_batch} packs, which would all "
                "cost alike, as those of the next batch do: no batch would be like the data. Lower packing.alike"
            )
        for name, allowed in (("too_long", TOO_LONG), ("policy", tuple(POLICIES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"packing.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @property
    def packs_per_batch(self) -> int:
        """Packs in a global batch, whichever way it was given."""
        if self.batch is not None:
            return self.batch
        return max(1, round((self.batch_tokens or 0) / self.capacity))

    def of_plan(self) -> dict[str, Any]:
        """The options that a plan depends on: all but the global batch, which may change when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "batch_tokens")}
