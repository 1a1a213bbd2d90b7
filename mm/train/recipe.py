"""A recipe: everything a run is made of, in one typed tree. Presets and overrides are merged by `mm.configure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm import configure
from mm.configure import RecipeError
from mm.model.multimodal import ModelOptions
from mm.packing.plan import PackingOptions
from mm.tokenizers.text import TokenizerOptions
from mm.train.optim import OptimOptions
from mm.train.parallel import Precision
from mm.train.schedule import ScheduleOptions
from mm.train.warm_start import WarmStartOptions


@dataclass
class SourceOptions:
    """One source of samples: a split of a data card.

    weight: share of the tokens in the mixture; leave it out everywhere to take the sources as large as they are
    epochs: how often each sample is seen at most; None follows the recipe's `epochs`
    """

    card: str
    split: str = "train"
    weight: float | None = None
    epochs: float | None = None


@dataclass
class DataOptions:
    """Where samples come from.

    index: folder for indexes and columns; safe to delete, safe to share between runs
    workers: loader processes per training process
    max_broken: share of samples that may turn out broken before the run stops
    """

    sources: dict[str, SourceOptions]
    validation: dict[str, SourceOptions] = field(default_factory=dict)
    index: str = "~/.cache/mm"
    workers: int = 1
    max_broken: float = 0.01


@dataclass
class Recipe:
    """A training run.

    run: folder of checkpoints, logs and the plan
    steps, epochs: how long; exactly one of them
    micro_batch: packs that one process works on at once
    init_from: run, checkpoint or export whose weights to start from (weights only, unlike resuming)
    warm_start: where linear adapters start, see `mm.train.warm_start`
    precision: `auto` computes in bf16 where the device does so natively
    validate_every, save_every: steps; 0 means only at the end
    """

    name: str
    model: ModelOptions
    tokenizer: TokenizerOptions
    data: DataOptions
    packing: PackingOptions
    run: str = "runs/${name}"
    seed: int = 0
    steps: int | None = None
    epochs: float | None = None
    micro_batch: int = 1
    init_from: str | None = None
    warm_start: WarmStartOptions | None = None
    precision: Precision = "auto"
    objective: dict[str, Any] = field(default_factory=lambda: {"_target_": "mm.objectives.next_token.NextToken"})
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    log_every: int = 10
    validate_every: int = 0
    save_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("a recipe needs exactly one of `steps` and `epochs`")
        if self.micro_batch < 1:
            raise RecipeError(f"micro_batch is {self.micro_batch}; it counts packs and must be at least 1")
        if self.keep < 1:
            raise RecipeError(f"keep is {self.keep}; without a checkpoint no run can be resumed, so it is at least 1")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file with dotted `key=value` overrides on top."""
        return configure.load(cls, path, overrides)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run).expanduser()
