"""A recipe: everything a run is made of, in one typed tree. Presets and overrides are merged by `mm.configure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mm import configure
from mm.bounds import Between, Count, CountOrNone, Epochs, Packs, Seed, Share, Steps
from mm.configure import RecipeError
from mm.data.cache import CacheOptions
from mm.model.multimodal import ModelOptions
from mm.packing.options import PackingOptions
from mm.packing.source import Unit
from mm.tokenizers.text import MediaOnly, TextTokenizer, TokenizerOptions
from mm.train.guard import GuardOptions
from mm.train.interrupts import seconds_of
from mm.train.optim import OptimOptions
from mm.train.parallel import ParallelOptions, Precision
from mm.train.schedule import ScheduleOptions
from mm.train.warm_start import WarmStartOptions

LogTo = Literal["tensorboard", "wandb", "trackio"]


@dataclass
class SourceOptions:
    """One source of samples: a split of a data card.

    weight: share of the mixture in `DataOptions.unit`, relative to the other weights; all sources have one or none. If
        none has, each takes the share at which all end together, as often as `epochs` says
    epochs: how often each sample is seen: 2 samples up, 0.5 down to half of the samples. With weights it is a bound:
        the first source that reaches it ends the run. None follows the recipe's `epochs`
    where: which samples are taken, such as ``clip > 0.28 and width >= 200``, see `mm.data.where`
    weights: factors of the loss weights of its tokens, each by a name of your own: ``{prior: {_target_:
        mm.packing.weights.Prior, alpha: 1}}``. They multiply, see `mm.packing.weights`
    """

    card: str
    split: str = "train"
    weight: Annotated[float, Between(0, 1e15, above=True)] | None = None
    epochs: Epochs | None = None
    where: str | None = None
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class DataOptions:
    """Where samples come from.

    unit: what weights are shares of: `tokens`; `samples`; or `epochs`, where a source of weight 2 is passed over twice
        while one of weight 1 is once
    lazy: index shards when the plan comes to them, in the background of training, and not all before it begins. Needs
        `steps`, and weights where there are several sources. See docs/remote.md
    index: folder for indexes and columns; safe to delete, safe to share between runs. All machines of a lazy run need
        to see it
    cache: keep copies of remote shards, and the rows of parquet files, on disk, see docs/remote.md; without it they are
        read in place
    workers: loader processes per training process
    max_broken: share of the samples of a stage that may turn out broken; with more of them the run stops
    max_broken_after: the share is of so many samples while the stage has read fewer, since the first ones say little.
        At the end of the stage it is of all that were read, however few
    """

    sources: dict[str, SourceOptions]
    validation: dict[str, SourceOptions] = field(default_factory=dict)
    unit: Unit = "tokens"
    lazy: bool = False
    index: str = "~/.cache/mm"
    cache: CacheOptions | None = None
    workers: Annotated[int, Between(0, 1024)] = 1
    max_broken: Share = 0.01
    max_broken_after: CountOrNone = 1000


OF_THE_WHOLE_RUN = {
    *("name", "run", "seed", "init_from", "warm_start", "log_to", "save_async", "keep", "keep_every", "time_limit"),
    "deterministic",
    "stages",
}
"""Keys that a stage cannot change."""


@dataclass
class Recipe:
    """A training run.

    tokenizer: of the text. An autoencoder (`model.autoencoder`) trains without: the text of its samples is left out
    run: folder of checkpoints, logs and the plan
    steps, epochs: how long; exactly one of them
    stages: what is laid over the rest in each stage, such as another mixture, capacity, freezing or learning rate; each
        says its own `steps` or `epochs`. See `mm.train.stages`
    micro_batch: packs that one process works on at once
    init_from: run, checkpoint or export whose weights to start from (weights only, unlike resuming)
    warm_start: where linear adapters start, see `mm.train.warm_start`
    precision: `auto` computes in bf16 where the device does so natively
    deterministic: only kernels that sum in one order, so that a GPU gives the same bits again, after a resume too; an
        operation that has none stops the run. One process on a CPU does so anyway
    log_to: where figures go, beside the terminal and ``metrics.jsonl``; see docs/meters.md
    validate_every, save_every: steps; 0 means only at the end
    save_async: write checkpoints while training goes on, from a copy in memory; else training waits for each
    keep, keep_every: how many of the newest checkpoints stay, and of which steps all do, 0 for none; see
        docs/checkpoints.md
    time_limit: save and stop within this time of the start, such as 11h30m; repeating the command goes on
    guard: go back to a checkpoint when the loss spikes, past the batches since, see `mm.train.guard`; null: never
    watchdog: minutes without the end of a step after which every process tells where it stands; 0 for never
    """

    name: str
    model: ModelOptions
    data: DataOptions
    packing: PackingOptions
    tokenizer: TokenizerOptions | None = None
    run: str = "runs/${name}"
    seed: Seed = 0
    steps: Steps | None = None
    epochs: Epochs | None = None
    micro_batch: Packs = 1
    init_from: str | None = None
    warm_start: WarmStartOptions | None = None
    precision: Precision = "auto"
    deterministic: bool = False
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    objective: dict[str, Any] = field(default_factory=lambda: {"_target_": "mm.objectives.next_token.NextToken"})
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    log_every: CountOrNone = 10
    log_to: list[LogTo] = field(default_factory=lambda: ["tensorboard"])
    validate_every: CountOrNone = 0
    save_every: CountOrNone = 0
    save_async: bool = True
    keep: Count = 2
    keep_every: CountOrNone = 0
    time_limit: str | None = None
    guard: GuardOptions | None = None
    watchdog: Annotated[float, Between(0, 1e6)] = 30.0
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.model.autoencoder is None:
            raise RecipeError("`tokenizer` is missing: a language model needs the tokenizer of its text")
        if self.warm_start is not None and self.model.autoencoder is not None:
            raise RecipeError("warm_start sets adapters, and `model.autoencoder` has none; remove it")
        if self.stages:
            self._check_stages()
        elif (self.steps is None) == (self.epochs is None):
            raise RecipeError("a recipe needs exactly one of `steps` and `epochs`")
        elif self.steps is None and self.data.lazy:
            raise RecipeError("data.lazy: how many steps an epoch has is not known ahead; say `steps`, not `epochs`")
        if self.micro_batch < 1:
            raise RecipeError(f"micro_batch is {self.micro_batch}; it counts packs and must be at least 1")
        if self.keep < 1:
            raise RecipeError(f"keep is {self.keep}; without a checkpoint no run can be resumed, so it is at least 1")
        if self.keep_every and not self.stages and (self.save_every < 1 or self.keep_every % self.save_every):
            raise RecipeError(
                f"keep_every is {self.keep_every} and save_every is {self.save_every}: it keeps what was saved, so it "
                "has to be a multiple"
            )
        if self.time_limit is not None:
            seconds_of(self.time_limit)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file with dotted `key=value` overrides on top."""
        return configure.load(cls, path, overrides)

    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer of the text; one that leaves text out where an autoencoder is trained."""
        return MediaOnly() if self.tokenizer is None else TextTokenizer.load(self.tokenizer)

    def stage_recipes(self) -> list[Recipe]:
        """The recipe of each stage; the recipe itself if it names none."""
        if not self.stages:
            return [self]
        recipes = []
        for number, changes in enumerate(self.stages):
            try:
                recipes.append(configure.derive(self, {**changes, "stages": []}))
            except RecipeError as error:
                raise RecipeError(f"stages.{number}: {str(error).removeprefix('command line: ')}") from None
        return recipes

    def _check_stages(self) -> None:
        if self.steps is not None or self.epochs is not None:
            raise RecipeError("with `stages`, each of them says its `steps` or `epochs`, and the recipe itself none")
        for number, changes in enumerate(self.stages):
            if whole := OF_THE_WHOLE_RUN & changes.keys():
                named = ", ".join(sorted(whole))
                raise RecipeError(f"stages.{number}: {named} cannot differ between the stages of a run")
        self.stage_recipes()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run).expanduser()
