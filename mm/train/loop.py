"""The training loop: a run from top to bottom.

recipe ─▶ index, lengths, plan ─▶ (processes meet) ─▶ model ─▶ for each step:
    fetch · forward and backward per micro-batch · clip · check finite · update · log · validate · save
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader

from mm import configure
from mm.model.build import build_trainable
from mm.model.multimodal import MultimodalLM
from mm.model.trainable import Trainable
from mm.objectives.base import Objective
from mm.packing.batch import Batch
from mm.packing.materialise import MicroStep
from mm.terminal import console, track
from mm.train import checkpoint
from mm.train.average import averaged
from mm.train.checkpoint import Position
from mm.train.clock import clock_of
from mm.train.dataset import PlannedData, check_division
from mm.train.engine import build_engine, check_engine
from mm.train.faults import NO_WEIGHT, NOT_FINITE, Skips, Watchdog, out_of_memory_explained, samples_of
from mm.train.guard import Guard, GuardOptions, Spike
from mm.train.interrupts import Interrupts, Stopped, leave_to_the_run, seconds_of
from mm.train.ledger import Ledger, Tally, reports_of
from mm.train.memory import Memory, check_memory, memory_of_a_process
from mm.train.meter import Meter, device_peak, training_factors
from mm.train.optim import freeze, set_learning_rate
from mm.train.parallel import World, join_world, local_world, reproducible, resolve_precision
from mm.train.profile import Steps, profiling
from mm.train.recipe import Recipe
from mm.train.records import Seen, writers
from mm.train.saving import Saver, saving
from mm.train.schedule import learning_rate_factor
from mm.train.stages import RunError, Stage, open_stages
from mm.train.trackers import check_installed
from mm.train.warm_start import warm_start

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


Outcome = Literal["ended", "stopped", "rewound"]


def train(recipe: Recipe, profiled: Steps | None = None) -> Path:
    """Run the recipe to its end and return its last checkpoint. A run folder that holds a checkpoint is resumed.

    Args:
        profiled: steps to profile, of the stage that the run is in, see `mm.train.profile`.

    Raises:
        Stopped: SIGTERM or the recipe's `time_limit` asked for it; the run has saved, and another call goes on.
    """
    interrupts = Interrupts(seconds_of(recipe.time_limit) if recipe.time_limit else None)
    for chosen in recipe.stage_recipes():
        processes, parallel = local_world()[1], chosen.parallel
        check_engine(parallel, chosen.optim, processes, chosen.packing.capacity)
        check_division(chosen.packing, processes // parallel.context, chosen.micro_batch)
        if parallel.engine == "fsdp2" and not parallel.offload:
            shards, whole = processes // parallel.replicate, build_trainable(chosen.model, meta=True)
            check_memory(whole, chosen.optim, shards, memory_of_a_process())
    check_installed(recipe.log_to)
    with locked(recipe.folder):
        resumed = checkpoint.latest(recipe.folder / "checkpoints")
        if resumed:
            check_architecture(resumed, recipe)
        stages = stages_from(resumed, recipe)
        stages = chain([next(stages)], stages)  # the first is planned before processes meet
        with (
            reproducible(recipe.deterministic),
            join_world() as world,
            saving(recipe, world) as saver,
            out_of_memory_explained(world),
        ):
            outcome: Outcome = "ended"
            while outcome != "stopped" and (stage := next(stages, None)):
                if stage.is_over and stage.number + 1 < len(recipe.stage_recipes()):
                    continue
                outcome = run(recipe, stage, world, saver, interrupts, profiled)
                profiled = None
                gc.collect()  # the sharded model of this stage, before the next is built
                if outcome == "rewound":
                    stages = stages_from(saver.last, recipe)
    assert saver.last is not None
    if outcome == "stopped":
        if world.is_first:
            console.print(f"stopped, as it was asked to; repeat the command to go on from {saver.last}", soft_wrap=True)
        raise Stopped
    return saver.last


def stages_from(resumed: Path | None, recipe: Recipe) -> Iterator[Stage]:
    """The stages that are left, from a checkpoint on."""
    return open_stages(recipe, recipe.folder, checkpoint.read_position(resumed) if resumed else None)


def check_architecture(resumed: Path, recipe: Recipe) -> None:
    """Raise `CheckpointError` unless a checkpoint's parameters are those of its stage's model."""
    recipes, finished = recipe.stage_recipes(), checkpoint.read_position(resumed).finished
    here = recipes[min(len(finished), len(recipes) - 1)]
    checkpoint.check_architecture(resumed, build_trainable(here.model, meta=True))


def run(
    whole: Recipe, stage: Stage, world: World, saver: Saver, interrupts: Interrupts, profiled: Steps | None = None
) -> Outcome:
    """The steps of a stage on this process, until the last of its checkpoints is complete.

    It ends early where it was asked to stop, and where the guard has gone back to an earlier checkpoint.
    """
    if profiled:
        profiled.check_within(stage.position.step, stage.end)
    recipe, data, held_out = stage.recipe, stage.data, stage.held_out
    folder, objective = recipe.folder, configure.build(recipe.objective, Objective)
    dtype = resolve_precision(recipe.precision, world.device)
    last = saver.last

    saved = checkpoint.read_position(last) if last else None
    begins = saved is not None and len(saved.finished) < stage.number
    if begins and saved:
        check_stage_before(whole.stage_recipes()[stage.number - 1], data, saved, stage.begin)
    torch.manual_seed(recipe.seed)
    model = build_trainable(recipe.model, meta=not world.is_first).train()  # `build_engine` gives others their weights
    objective.prepare(model, data.blueprint.processor, world.device)
    grows = begins and last is not None and not checkpoint.fits(last, model)
    resumed = None if grows else last  # into another architecture go weights alone
    start = last if grows else checkpoint.find(recipe.init_from) if recipe.init_from else None
    if world.is_first and not resumed:
        if start and checkpoint.load_beginning(start, model):
            grown = "grow into another architecture; moments start anew (docs/moma.md)"
            console.print(f"the weights of {start} {grown}", soft_wrap=True)
        if recipe.warm_start and not saved:
            batches = first_packs(data, recipe.warm_start.packs, world.device)
            assert isinstance(model, MultimodalLM)  # `Recipe` has seen to it
            warm_start(model.to(world.device), batches, data.blueprint.processor.text.end, recipe.warm_start.penalty)
    freeze(model, recipe.optim)
    factors = training_factors(model.trained_parts())
    engine = build_engine(model, world, dtype, recipe.parallel, recipe.optim, resumed)
    optimizer = engine.optimizer
    saver.prepare(engine)

    position, total = stage.position, stage.end
    if resumed:
        checkpoint.load(resumed, engine, next_stage=begins)
        if not begins:
            check_plan(position, data, resumed)
    if begins and saved:
        position = replace(position, tokens=saved.tokens)
    batches = load_batches(recipe, world, data, position, total)
    reader, share = world.reader(recipe.parallel.context), world.share(recipe.parallel.context)
    micro_steps = recipe.packing.packs_per_batch // (reader.count * recipe.micro_batch)
    peak, clock = device_peak(world.device, dtype), clock_of(world.device)
    memory = Memory(world.device, engine.held())
    meter = Meter(objective.losses(data.names), factors, peak, world.sum, position.tokens, clock, memory, world.max)
    steps_done = range(stage.begin + 1, position.step + 1)
    reports = reports_of(folder, steps_done)
    ledger = Ledger(folder, recipe.data, reports, writes=share.index == 0)
    seen = Seen(folder / "seen", world, position.step + 1, writes=share.index == 0)
    guard = Guard(recipe.guard, folder, steps_done, writes=world.is_first) if recipe.guard else None
    skips = Skips(ledger, data, reports, logs=world.is_first)

    with (
        closing(engine),
        writers(whole, world, position, total) as outputs,
        interrupts.heard(),
        Watchdog(folder, world.rank, recipe.watchdog) as watchdog,
        profiling(profiled, folder, world, position.step) as step_profiled,
    ):
        for step in range(position.step, total):
            with meter.timed("data"):
                micro_batches = [batch.to(world.device) for batch in islice(batches, micro_steps)]
            weights = objective.weights(micro_batches)
            votes = (saver.failed, *interrupts.votes(saver.reserve))
            with meter.timed("sync"):
                own = (*weights.values(), *ledger.add(micro_batches), *votes)
                *sums, samples, broken, failed, stop, save = world.sum([float(one) for one in own])
            denominators = dict(zip(weights, sums, strict=True))
            learns = any(sums)  # the same on all processes; without it the step is to leave no trace
            ledger.count(Tally(int(samples), int(broken)))
            if failed:
                saver.wait()
            factor = learning_rate_factor(recipe.schedule, step - stage.begin, total - stage.begin)
            set_learning_rate(optimizer, factor)

            totals: list[tuple[Tensor, Tensor]] = []
            for batch in micro_batches if learns else ():
                with meter.timed("forward"):
                    loss, parts = objective.loss(engine.model, batch, denominators, data.names)
                with meter.timed("backward"):
                    engine.backward(loss)
                totals.append(parts[objective.total])
                meter.add_losses(parts)
                meter.add_batch(
                    batch.real_tokens, len(batch.packs[1:]) * recipe.packing.capacity // share.count, model.flops(batch)
                )
            norm, cause = None, NO_WEIGHT
            if learns:
                with meter.timed("optimizer"):
                    norm, finite = engine.step()
                    model.after_update(finite)
                cause = None if finite else NOT_FINITE
            meter.end_step(norm, recipe.optim.lr * factor)
            done = step + 1
            seen.add(done, micro_batches)
            skips.add(done, cause, micro_batches)
            here = replace(position, step=done, packs=stage.packs_at(done))
            watchdog.feed()
            outputs.advance()
            if guard and learns and (spike := guard.judge(done, mean_loss(totals, world), micro_batches)):
                ledger.note(str(spike), samples=samples_of(spike.rows, data))
                if rewind(spike, saver, here, guard.options, world):
                    return "rewound"
            validates = due(recipe.validate_every, done, total)
            saves = stop or save or due(recipe.save_every, done, total)
            figures = {}
            if saves or validates or due(recipe.log_every, done, total):
                figures = meter.report() | ledger.figures() | skips.figures()
            if held_out and validates:
                with meter.paused():
                    found, picture = validate(model, objective, held_out, world, recipe, ledger)
                    figures |= found
                    outputs.show(done, picture)
                    if recipe.optim.average and recipe.optim.average.validate:
                        with averaged(model, optimizer):
                            of_average, _ = validate(model, objective, held_out, world, recipe, ledger)
                        figures |= {f"average/{name}": figure for name, figure in of_average.items()}
            if figures:
                outputs.write(done, figures)
            if saves:
                with meter.paused():
                    saver.save(engine, replace(here, tokens=meter.tokens))
            with meter.paused():
                step_profiled()
            if stop:
                saver.wait()
                return "stopped"
        if saver.wait() is None:
            raise RunError(f"nothing to do: {folder} asks for {total} steps")
        ledger.check_end()
        skips.check_end(total - stage.begin)
    return "ended"


def mean_loss(totals: Sequence[tuple[Tensor, Tensor]], world: World) -> float:
    """Σwℓ / Σw of a step over its micro-batches and all processes."""
    weighted, weight = world.sum([float(sum(column)) for column in zip(*totals, strict=True)])
    return weighted / weight if weight else 0.0


def rewind(spike: Spike, saver: Saver, here: Position, options: GuardOptions, world: World) -> bool:
    """Whether the run is to go on from an earlier checkpoint; if not, there is none and it goes on from here.

    Raises:
        RunError: it has done so too often.
    """
    if here.rewinds >= options.rewinds:
        raise RunError(
            f"{spike}. The guard has gone back {here.rewinds} times, as often as guard.rewinds allows. Lower optim.lr "
            "or optim.clip, or look at the samples in ledger.jsonl; the last checkpoint is intact"
        )
    rewound = saver.rewind(spike.last_good, here)
    if world.is_first:
        way = f"from {saver.last}" if rewound else f"as it is, no checkpoint is as old as step {spike.last_good}"
        console.print(f"{spike}; the run goes on {way}", soft_wrap=True)
    return rewound


def due(every: int, step: int, total: int) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens after this one."""
    return step == total or (every > 0 and step % every == 0)


@torch.no_grad()
def validate(
    model: Trainable, objective: Objective, held_out: PlannedData, world: World, recipe: Recipe, ledger: Ledger
) -> tuple[dict[str, float], Tensor | None]:
    """Figures over all packs of the validation split, and a picture of the first of them if the objective draws one.

    Raises:
        RunError: nothing in it bears loss, such as where all samples are broken.
    """
    model.eval()
    totals: dict[str, Tensor] = {}
    picture, broken = None, 0
    context = recipe.parallel.context
    capacity = recipe.packing.capacity if context > 1 else None
    dataset = held_out.materialiser(capacity, world.share(context))
    for micro_step in held_out.every_pack(world.reader(context)):
        batch = dataset[micro_step].to(world.device)
        broken += ledger.add_validation([batch]).broken
        examined = objective.examine(model, batch, held_out.names)
        picture = examined.picture if picture is None else picture
        for name, added in examined.sums.items():
            added = added.double().cpu()
            totals[name] = totals[name] + added if name in totals else added
    model.train()
    broken, *values = world.sum([float(broken), *(value for total in totals.values() for value in total.tolist())])
    summed = iter(values)
    sums = {name: torch.tensor([next(summed) for _ in total], dtype=torch.float64) for name, total in totals.items()}
    of_losses = [pair for name, pair in sums.items() if name.startswith("loss/")]
    if of_losses and not any(float(weight) for _, weight in of_losses):
        raise RunError(
            f"nothing in the validation split bears loss: {broken:,.0f} of its samples are broken, see {ledger.path}; "
            "mend data.validation, or leave it out"
        )
    return objective.figures(sums) | {"validation/broken": broken}, picture


def first_packs(data: PlannedData, packs: int, device: torch.device) -> Iterator[Batch]:
    """The first packs of the plan."""
    dataset = data.materialiser()
    for number in track(range(min(packs, data.plan.planned)), description="warm start", transient=True):
        yield dataset[MicroStep(0, (number,))].to(device)


def load_batches(recipe: Recipe, world: World, data: PlannedData, position: Position, total: int) -> Iterator[Batch]:
    """This rank's micro-batches from a position on, made ahead of time by the loader's workers."""
    context = recipe.parallel.context
    steps = data.micro_steps(
        world.reader(context),
        recipe.micro_batch,
        seed=recipe.seed,
        steps=range(position.step, total),
        first_pack=position.packs,
    )
    static = world.device.type == "cuda" or recipe.parallel.compile or context > 1
    loader = DataLoader(
        data.materialiser(recipe.packing.capacity if static else None, world.share(context), ahead=True),
        sampler=steps,
        batch_size=None,
        num_workers=recipe.data.workers,
        prefetch_factor=4 if recipe.data.workers else None,
        worker_init_fn=leave_to_the_run,
    )
    return iter(loader)


def check_plan(position: Position, data: PlannedData, resumed: Path) -> None:
    if position.plan != data.plan.fingerprint:
        raise RunError(
            f"{resumed} was saved under another plan ({position.plan[:8]}, now {data.plan.fingerprint[:8]}): its pack "
            "numbers mean other samples. Restore the recipe's data and packing, or start a new run with init_from"
        )


def check_stage_before(recipe: Recipe, data: PlannedData, saved: Position, end: int) -> None:
    """Raise `RunError` if, by its reports, the stage that ended at this step did not end well.

    It did so when it ended. Without this, repeating the command would go on with the next stage all the same.

    Args:
        recipe: of that stage. saved: its last position.
    """
    steps = range(saved.finished[-1].step + 1 if saved.finished else 1, end + 1)
    reports = reports_of(recipe.folder, steps)
    ledger = Ledger(recipe.folder, recipe.data, reports, writes=False)
    ledger.check_end()
    Skips(ledger, data, reports, logs=False).check_end(len(steps))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, and tell if it cannot be written; only the first process of a run takes the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock").acquire(timeout=0) if local_world()[0] == 0 else nullcontext():
            yield
    except Timeout:
        raise RunError(
            f"another process is training in {folder}; wait for it or set `run:` to another folder"
        ) from None
    except OSError as error:
        if error.errno not in UNWRITABLE or not str(error.filename or folder).startswith(str(folder)):
            raise
        raise RunError(
            f"could not write to {error.filename or folder}: {error.strerror}. Checkpoints are intact; free some "
            "space, make the folder writable or set `run:` to another, and repeat the command to go on from the last"
        ) from error
