"""DeepSpeed trains as FSDP2 does, to rounding, and either goes on from the other's checkpoints."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Mapping
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
from mm.train.parallel import ParallelOptions, join_world
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
    "zero 1": (*zero(1), *SAVED),
    "zero 2": (*zero(2), *SAVED),
    "zero 3": (*zero(3), *SAVED),
    "zero 2, optimizer on the host": (*zero(2), *SAVED, "parallel.offload=true"),
    "zero 3, optimizer on the host, blocks keep their input": (
        *(*zero(3), *SAVED),
        *("parallel.offload=true", "parallel.activations=full"),
    ),
    "parts, fsdp2": (*SAVED, PARTS),
    "parts, zero 1": (*zero(1), *SAVED, PARTS),
    "parts, zero 3": (*zero(3), *SAVED, PARTS),
    "bf16, fsdp2": (*SAVED, "precision=bf16"),
    "bf16, zero 2": (*zero(2), *SAVED, "precision=bf16", "save_async=false"),
    "bf16, zero 3": (*zero(3), *SAVED, "precision=bf16"),
}


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on two processes, by name."""
    folder = tmp_path_factory.mktemp("together")
    runs = {name: folder / name.replace(" ", "-") for name in ON_TWO}
    train_together(folder, 2, [[str(recipe), f"run={runs[name]}", *changes] for name, changes in ON_TWO.items()])
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


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_without_a_launcher_trains_as_two(
    recipe: Path, together: dict[str, Path], tmp_path: Path, stage: int
) -> None:
    same_course(train_here(recipe, f"run={tmp_path}", *zero(stage), *SAVED), together["fsdp2"])


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parts_and_rates_and_decay_of_parts_hold(together: dict[str, Path], stage: int) -> None:
    same_course(together[f"parts, zero {stage}"], together["parts, fsdp2"])
    assert losses(together["parts, fsdp2"])[10] != pytest.approx(losses(together["fsdp2"])[10], rel=1e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_in_16_bits_the_losses_are_those_of_fsdp2_to_their_rounding(together: dict[str, Path], stage: int) -> None:
    same_course(together[f"bf16, zero {stage}"], together["bf16, fsdp2"], rel=1e-3)


def train_apart(rank: int, size: int, recipe: Path, folder: Path, stage: int | None) -> None:
    """One of `size` processes that divide a batch of two packs, one of words only and one with a picture.

    The third of four steps has a gradient that is not finite, on the last process. By FSDP2 if there is no stage.
    """
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in launched.items()})
    torch.set_num_threads(1)
    loaded = Recipe.load(recipe)
    options = ParallelOptions("deepspeed", stage) if stage else ParallelOptions()
    own, weight = apart(loaded, folder / f"plan{rank}")
    own = own[rank::size]
    with join_world() as world:
        torch.manual_seed(0)
        model = build_model(loaded.model, meta=not world.is_first).train()
        engine = build_engine(model, world, torch.float32, options, loaded.optim)
        course = []
        for step in range(4):
            loss = 0.0
            for batch in own:
                share, _ = NextToken().loss(engine.model, batch, {"next_token": weight}, list(loaded.data.sources))
                broken = step == 2 and world.rank + 1 == world.size
                engine.backward(share * float("nan") if broken else share)
                loss += float(share)
            before = flat(engine.state_dict())
            norm, finite = engine.step()
            unchanged = all(torch.equal(value, before[name]) for name, value in flat(engine.state_dict()).items())
            course.append((*world.sum([loss]), norm, finite, unchanged))
        torch.save(course, folder / f"{stage}-{size}-{rank}")
        engine.close()
        del model, engine


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


@pytest.fixture(scope="module")
def apart_on_one(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float, bool, bool]]:
    """(loss, gradient norm, finite, unchanged) of each step of `train_apart` on one process by FSDP2."""
    folder = tmp_path_factory.mktemp("apart")
    spawn(train_apart, args=(1, recipe, folder, None), nprocs=1)
    return torch.load(folder / "None-1-0")


@pytest.mark.parametrize("stage", STAGES)
def test_words_on_one_process_and_pictures_on_another_and_a_gradient_that_is_not_finite(
    recipe: Path,
    apart_on_one: list[tuple[float, float, bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: int,
) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    spawn(train_apart, args=(2, recipe, tmp_path, stage), nprocs=2)
    for rank in range(2):
        course = torch.load(tmp_path / f"{stage}-2-{rank}")
        assert [step[2:] for step in course] == [(True, False), (True, False), (False, True), (True, False)]
        assert [step[2:] for step in apart_on_one] == [step[2:] for step in course]
        assert [step[0] for step in course] == pytest.approx([step[0] for step in apart_on_one], rel=1e-5)
        for step in (0, 1, 3):
            assert course[step][1] == pytest.approx(apart_on_one[step][1], rel=1e-4)
        assert not torch.isfinite(torch.tensor(course[2][1]))


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


@pytest.mark.parametrize("name", ["zero 1", "zero 2", "zero 3", "parts, zero 3"])
def test_a_checkpoint_holds_what_one_of_fsdp2_holds(together: dict[str, Path], name: str) -> None:
    reference = contents(checkpoint.find(together["parts, fsdp2" if "parts" in name else "fsdp2"]))
    found = contents(checkpoint.find(together[name]))
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


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
    ("zero 2", zero(3), 2),
    ("bf16, zero 3", ("precision=bf16",), 2),
    ("zero 3", zero(1), 1),
    ("fsdp2", zero(2), 1),
    ("parts, fsdp2", (*zero(3), PARTS), 1),
    ("parts, zero 3", (PARTS,), 1),
]
"""Run that is forked at step 5, what goes on, and on how many processes."""


@pytest.fixture(scope="module")
def continued(recipe: Path, together: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What became of each of `CONTINUED`."""
    folder = tmp_path_factory.mktemp("continued")
    runs = [fork_run(together[name], folder / str(number), 5) for number, (name, _, _) in enumerate(CONTINUED)]
    jobs = list(zip(runs, CONTINUED, strict=True))
    train_together(
        folder, 2, [[str(recipe), f"run={run}", *SAVED, *changes] for run, (_, changes, size) in jobs if size == 2]
    )
    for run, (_, changes, size) in jobs:
        if size == 1:
            train_here(recipe, f"run={run}", *SAVED, *changes)
    return runs


@pytest.mark.parametrize("number", range(len(CONTINUED)))
def test_either_engine_goes_on_from_the_other_s_checkpoint_on_any_number_of_processes(
    together: dict[str, Path], continued: list[Path], number: int
) -> None:
    name = CONTINUED[number][0]
    same_course(continued[number], together[name], rel=1e-3 if "bf16" in name else 1e-5)


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
        ("parallel={engine: deepspeed, zero: 0}", "ZeRO has the stages 1, 2 and 3"),
        ("parallel={zero: 2}", "fsdp2 shards everything; add `engine: deepspeed`"),
        ("parallel={engine: horovod}", "expected one of 'fsdp2', 'deepspeed'"),
    ],
)
def test_stages_that_do_not_exist_are_refused(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe, [change])
