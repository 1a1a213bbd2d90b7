"""DeepSpeed trains as FSDP2 does, to rounding, and either goes on from the other's checkpoints."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from mm.configure import RecipeError
from mm.model.multimodal import build_model
from mm.objectives.next_token import NextToken
from mm.packing.batch import Batch
from mm.packing.materialise import MicroStep
from mm.sample import Modality
from mm.train import checkpoint
from mm.train.dataset import open_data
from mm.train.engine import build_engine
from mm.train.export import export_run
from mm.train.inventory import table_of, verify
from mm.train.optim import OptimOptions, freeze
from mm.train.parallel import ParallelOptions, World, join_world
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests import faulty_objectives
from tests.small_world import fork_run, free_port, losses, tiny_model, train_here, train_together
from tests.test_saving import contents

pytestmark = pytest.mark.timeout(900)

STAGES = (1, 2, 3)
SAVED = ("steps=10", "save_every=5")
PARTS = (
    "optim.parts=[{match: ^encoders.image, freeze: true}, {match: ^decoder, layer_decay: 0.5, weight_decay: 0.5}, "
    "{match: ^adapters, lr: 1e-2}]"
)


def zero(stage: int) -> tuple[str, ...]:
    """Changes of a recipe that train by DeepSpeed."""
    return ("parallel.engine=deepspeed", f"parallel.zero={stage}")


ON_TWO: dict[str, tuple[str, ...]] = {
    "fsdp2": SAVED,
    "zero 3": (*zero(3), *SAVED),
}
ALSO_ON_TWO: dict[str, tuple[str, ...]] = {
    "zero 1": (*zero(1), *SAVED),
    "zero 2": (*zero(2), *SAVED),
    "zero 2, optimizer on the host": (*zero(2), *SAVED, "parallel.offload=true"),
    "zero 3, optimizer on the host, blocks keep their input": (
        *(*zero(3), *SAVED),
        *("parallel.offload=true", "parallel.activations=full"),
    ),
    "parts, fsdp2": (*SAVED, PARTS),
    "parts, zero 3": (*zero(3), *SAVED, PARTS),
    "bf16, fsdp2": (*SAVED, "precision=bf16"),
    "bf16, zero 2": (*zero(2), *SAVED, "precision=bf16", "save_async=false"),
    "bf16, zero 3": (*zero(3), *SAVED, "precision=bf16"),
}


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on two processes, by name."""
    return on_two(recipe, tmp_path_factory.mktemp("together"), ON_TWO)


@pytest.fixture(scope="module")
def more(recipe: Path, together: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same and others, for the slow tests."""
    return together | on_two(recipe, tmp_path_factory.mktemp("more"), ALSO_ON_TWO)


def on_two(recipe: Path, folder: Path, changed: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    runs = {name: folder / name.replace(" ", "-") for name in changed}
    train_together(folder, 2, [[str(recipe), f"run={runs[name]}", *changes] for name, changes in changed.items()])
    return runs


def same_course(run: Path, other: Path, rel: float = 1e-5) -> None:
    assert list(losses(run)) == list(losses(other)) == list(range(1, 11))
    assert losses(run) == pytest.approx(losses(other), rel=rel)
    assert losses(run, "gradient_norm") == pytest.approx(losses(other, "gradient_norm"), rel=10 * rel)
    assert losses(run, "validation_loss") == pytest.approx(losses(other, "validation_loss"), rel=rel)


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", [name for name in ON_TWO if name.startswith("zero")])
def test_two_processes_of_deepspeed_train_as_those_of_fsdp2(together: dict[str, Path], name: str) -> None:
    same_course(together[name], together["fsdp2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALSO_ON_TWO if name.startswith("zero")])
def test_so_they_do_in_other_stages_and_with_the_optimizer_on_the_host(more: dict[str, Path], name: str) -> None:
    same_course(more[name], more["fsdp2"])


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_without_a_launcher_trains_as_two(
    recipe: Path, together: dict[str, Path], tmp_path: Path, stage: int
) -> None:
    same_course(train_here(recipe, f"run={tmp_path}", *zero(stage), *SAVED), together["fsdp2"])


@pytest.mark.slow
def test_frozen_parts_and_rates_and_decay_of_parts_hold(more: dict[str, Path]) -> None:
    same_course(more["parts, zero 3"], more["parts, fsdp2"])
    assert losses(more["parts, fsdp2"])[10] != pytest.approx(losses(more["fsdp2"])[10], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_16_bits_the_losses_are_those_of_fsdp2_to_their_rounding(more: dict[str, Path], stage: int) -> None:
    same_course(more[f"bf16, zero {stage}"], more["bf16, fsdp2"], rel=1e-3)


Course = list[tuple[float, float, bool, bool]]
"""Loss, gradient norm, whether it is finite and whether the update changed nothing, of each step."""


def train_apart(
    rank: int, size: int, port: int, recipe: Path, folder: Path, engines: Sequence[ParallelOptions]
) -> None:
    """One of `size` processes that divide a batch of two packs, one of words only and one with a picture.

    Writes the `Course` of every engine.
    """
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    torch.set_num_threads(1)
    loaded = Recipe.load(recipe)
    packs, weight = apart(loaded, folder / f"plan{rank}")
    with join_world() as world:
        courses = [course(loaded, world, options, packs[rank::size], weight) for options in engines]
        torch.save(courses, folder / str(rank))


def course(recipe: Recipe, world: World, options: ParallelOptions, packs: Sequence[Batch], weight: float) -> Course:
    """Four steps; the gradient of the third is not finite, on the last process."""
    torch.manual_seed(0)
    model = build_model(recipe.model, meta=not world.is_first).train()
    engine = build_engine(model, world, torch.float32, options, recipe.optim)
    steps = []
    for step in range(4):
        loss = 0.0
        for batch in packs:
            share, _ = NextToken().loss(engine.model, batch, {"next_token": weight}, list(recipe.data.sources))
            broken = step == 2 and world.rank + 1 == world.size
            engine.backward(share * float("nan") if broken else share)
            loss += float(share)
        before = flat(engine.state_dict())
        norm, finite = engine.step()
        unchanged = all(torch.equal(value, before[name]) for name, value in flat(engine.state_dict()).items())
        steps.append((*world.sum([loss]), norm, finite, unchanged))
    engine.close()
    return steps


def apart(recipe: Recipe, folder: Path) -> tuple[list[Batch], float]:
    """A pack of words only and one with a picture, and the sum of their weights."""
    data = open_data(recipe, Blueprint.of(recipe), recipe.data.sources, folder, epochs=recipe.epochs)
    data.plan.ensure(32)
    batches = [data.materialiser()[MicroStep(0, (pack,))] for pack in range(32)]
    words = next(batch for batch in batches if not batch.media)
    picture = next(batch for batch in batches if Modality.IMAGE in batch.media)
    return [words, picture], float(words.weights.sum() + picture.weights.sum())


def flat(state: tuple[Mapping[str, object], Mapping[str, object]]) -> dict[str, torch.Tensor]:
    """What this process holds of every tensor."""
    found = {}
    for part in state:
        for name, value in part.items():
            if isinstance(value, torch.Tensor):
                found[name] = (value.to_local() if hasattr(value, "to_local") else value).clone()
    return found


@pytest.mark.slow
def test_words_on_one_process_and_pictures_on_another_and_a_gradient_that_is_not_finite(
    recipe: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    spawn(train_apart, args=(1, free_port(), recipe, one, [ParallelOptions()]), nprocs=1)
    stages = [ParallelOptions("deepspeed", stage) for stage in STAGES]
    spawn(train_apart, args=(2, free_port(), recipe, two, stages), nprocs=2)
    (expected,) = torch.load(one / "0")
    assert [step[2:] for step in expected] == [(True, False), (True, False), (False, True), (True, False)]
    assert expected[3][0] < expected[0][0]
    for rank in range(2):
        for found in torch.load(two / str(rank)):
            assert [step[2:] for step in found] == [step[2:] for step in expected]
            assert [step[0] for step in found] == pytest.approx([step[0] for step in expected], rel=1e-5)
            norms = [[step[1] for step in steps if step[2]] for steps in (found, expected)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_step_that_is_skipped_is_noted_and_the_run_goes_on_as_with_fsdp2(recipe: Path, tmp_path: Path) -> None:
    faulty = ("steps=4", "objective._target_=tests.faulty_objectives.NotFinite", "objective.call=6")
    runs = []
    for name, changes in (("fsdp2", ()), ("zero", zero(3))):
        faulty_objectives.calls.clear()
        runs.append(train_here(recipe, f"run={tmp_path / name}", *faulty, *changes))
    for run in runs:
        (event,) = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
        assert event["event"] == "step 2: the gradient is not finite, the update was skipped"
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_what_one_of_fsdp2_holds(together: dict[str, Path]) -> None:
    same_contents(together["zero 3"], together["fsdp2"])


@pytest.mark.slow
def test_so_it_does_in_other_stages_and_with_frozen_parts(more: dict[str, Path]) -> None:
    same_contents(more["zero 1"], more["fsdp2"])
    same_contents(more["zero 2"], more["fsdp2"])
    same_contents(more["parts, zero 3"], more["parts, fsdp2"])


def same_contents(run: Path, other: Path) -> None:
    found, reference = contents(checkpoint.find(run)), contents(checkpoint.find(other))
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
def test_frozen_weights_keep_every_bit_in_16_bits(recipe: Path, together: dict[str, Path], tmp_path: Path) -> None:
    changes = (*zero(3), "precision=bf16", PARTS, "steps=1", f"init_from={checkpoint.find(together['zero 3'])}")
    saved = contents(checkpoint.find(train_here(recipe, f"run={tmp_path}", *changes)))
    began = contents(checkpoint.find(together["zero 3"]))
    frozen = [name for name in began if name.startswith("model.encoders.image")]
    assert frozen
    assert all(torch.equal(saved[name], began[name]) for name in frozen)
    name = "model.decoder.layers.0.feed_forward.up.weight"
    assert (saved[name] - began[name]).abs().max() < 5e-3  # an update, not one after a rounding of 2⁻⁹
    assert not torch.equal(saved[name], saved[name].bfloat16().float())


CONTINUED = [
    ("zero 3", (), 2),
    ("fsdp2", zero(3), 2),
    ("bf16, zero 3", ("precision=bf16",), 2),
    ("zero 3", zero(1), 1),
    ("fsdp2", zero(2), 1),
    ("parts, fsdp2", (*zero(3), PARTS), 1),
    ("parts, zero 3", (PARTS,), 1),
]
"""Run that is forked at step 5, what goes on, and on how many processes."""


@pytest.fixture(scope="module")
def continued(recipe: Path, more: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What became of each of `CONTINUED`."""
    folder = tmp_path_factory.mktemp("continued")
    runs = [fork_run(more[name], folder / str(number), 5) for number, (name, _, _) in enumerate(CONTINUED)]
    jobs = list(zip(runs, CONTINUED, strict=True))
    train_together(
        folder, 2, [[str(recipe), f"run={run}", *SAVED, *changes] for run, (_, changes, size) in jobs if size == 2]
    )
    for run, (_, changes, size) in jobs:
        if size == 1:
            train_here(recipe, f"run={run}", *SAVED, *changes)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CONTINUED)))
def test_either_engine_goes_on_from_the_other_s_checkpoint_on_any_number_of_processes(
    more: dict[str, Path], continued: list[Path], number: int
) -> None:
    name = CONTINUED[number][0]
    same_course(continued[number], more[name], rel=1e-3 if "bf16" in name else 1e-5)


@pytest.mark.parametrize(("name", "changes"), [("zero 3", ()), ("fsdp2", zero(3))])
def test_either_engine_goes_on_from_the_other_s_checkpoint_of_two_processes_on_one(
    recipe: Path, together: dict[str, Path], tmp_path: Path, name: str, changes: tuple[str, ...]
) -> None:
    run = fork_run(together[name], tmp_path / "run", 5)
    train_here(recipe, f"run={run}", *SAVED, *changes)
    same_course(run, together[name])


def test_exports_are_the_same(together: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for name in ("fsdp2", "zero 3"):
        model = tiny_model()
        checkpoint.load_weights(export_run(together[name], tmp_path / name), model)
        found.append(model.state_dict())
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-3, atol=2e-5, msg=key)


def test_checkpoints_are_listed_and_verified(together: dict[str, Path]) -> None:
    assert table_of(together["zero 3"]).row_count == 2
    assert verify(checkpoint.find(together["zero 3"])).findings == ()


@pytest.mark.slow
def test_a_stage_that_trains_more_goes_on_as_with_fsdp2(recipe: Path, tmp_path: Path) -> None:
    """What begins to train has had no update where the rest has had some: AdamW corrects its bias by their number."""
    stages = "stages=[{steps: 5, optim: {parts: [{match: ^decoder, freeze: true}]}}, {steps: 5%s}]"
    fsdp2, deepspeed, both = (
        train_here(recipe, f"run={tmp_path / name}", "steps=null", stages % second, *changes)
        for name, second, changes in (
            ("fsdp2", "", ()),
            ("deepspeed", "", zero(3)),
            ("both", ", parallel: {engine: deepspeed}", ()),
        )
    )
    assert losses(deepspeed) == pytest.approx(losses(fsdp2), rel=1e-5)
    assert losses(both) == pytest.approx(losses(fsdp2), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_of_a_stage_does_not_outlive_it(stage: int) -> None:
    with join_world() as world:
        model = tiny_model()
        freeze(model, OptimOptions())
        engine = build_engine(model, world, torch.float32, ParallelOptions("deepspeed", stage), OptimOptions())
        kept = weakref.ref(model)
        engine.close()
        del model, engine
        gc.collect()
        assert kept() is None


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.kind=muon", "optim.kind: muon"),
        ("optim.parts=[{match: ^decoder, kind: muon}]", "optim.kind: muon"),
        ("optim.average={}", "optim.average"),
        ("parallel.compile=true", "parallel.compile"),
        ("parallel.reshard_after_forward=never", "parallel.reshard_after_forward"),
    ],
)
def test_what_deepspeed_would_not_do_is_refused(recipe: Path, tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(RecipeError, match=f"does without {named}"):
        train_here(recipe, f"run={tmp_path}", *zero(3), change)


def test_without_the_library_the_command_that_installs_it_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RecipeError, match=r"not installed: pip install 'mm-pretrain\[deepspeed\]'"):
        train_here(recipe, f"run={tmp_path}", *zero(3))


def test_stage_1_in_16_bits_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose `zero: 2`, or precision: fp32"):
        train_here(recipe, f"run={tmp_path}", *zero(1), "precision=bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel={engine: deepspeed, zero: 0}", "`parallel.zero` is 0; expected a whole number from 1 to 3"),
        ("parallel={zero: 2}", "fsdp2 shards everything; add `engine: deepspeed`"),
        ("parallel={engine: horovod}", "expected one of 'fsdp2', 'deepspeed'"),
    ],
)
def test_stages_that_do_not_exist_are_refused(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe, [change])
