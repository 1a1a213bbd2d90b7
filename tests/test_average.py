"""Averages of weights: over updates, as torch and timm have them, in checkpoints, sharded; and over checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typer.testing import CliRunner

from mm.cli import app
from mm.train import checkpoint
from mm.train.average import AverageOptions, averaged
from mm.train.checkpoint import CheckpointError
from mm.train.export import export_run, load_trained
from mm.train.optim import OptimOptions, build_optimizer, materialise_state, restore_options
from mm.train.parallel import Engine, World
from tests.small_world import fork_run, losses, tiny_model, train_here, train_together

pytestmark = pytest.mark.timeout(600)

torch.set_num_threads(1)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(options: AverageOptions, updates: int, watch: Callable[[nn.Module, int], object]) -> list[Tensor]:
    """The averages of a small model after so many updates; `watch` sees it and their number after each."""
    model = small()
    optim = OptimOptions(lr=0.05, average=options)
    optimizer = build_optimizer(model, optim)
    materialise_state(optimizer, optim)
    for update in range(1, updates + 1):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(update))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(model, update)
    return [optimizer.state[parameter]["average"] for parameter in model.parameters()]


# ------------------------------------------------------------------------------------------------------------ numbers


def test_without_warm_up_it_is_the_average_of_torch_bit_by_bit() -> None:
    theirs = AveragedModel(small(), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = trained(AverageOptions(0.9, warmup=0), 12, lambda model, _: theirs.update_parameters(model))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs.module.parameters(), strict=True))


@pytest.mark.parametrize("warmup", [1.0, 2.5, 10.0])
def test_with_warm_up_it_is_the_average_of_timm(warmup: float) -> None:
    theirs = ModelEmaV3(small(), decay=0.6, use_warmup=True, warmup_gamma=warmup, warmup_power=1.0)
    ours = trained(AverageOptions(0.6, warmup), 20, theirs.update)
    for one, other in zip(ours, theirs.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_warm_up_of_one_is_the_mean_of_all_so_far() -> None:
    seen: list[list[Tensor]] = []
    ours = trained(
        AverageOptions(0.999, warmup=1),
        9,
        lambda model, _: seen.append([p.detach().clone() for p in model.parameters()]),
    )
    for number, average in enumerate(ours):
        torch.testing.assert_close(average, torch.stack([state[number] for state in seen]).mean(0))


def test_an_update_that_is_skipped_is_not_averaged() -> None:
    model = small()
    options = OptimOptions(average=AverageOptions(0.5, warmup=0))
    optimizer = build_optimizer(model, options)
    materialise_state(optimizer, options)
    engine = Engine(model, optimizer, World(0, 1, torch.device("cpu")), options)
    state = optimizer.state[model[0].weight]
    for factor, updates in ((1.0, 1), (math.nan, 1), (1.0, 2)):
        before = state["average"].clone()
        engine.backward(factor * model(torch.ones(2, 4)).square().sum())
        _, finite = engine.step()
        assert finite == math.isfinite(factor) == (not torch.equal(before, state["average"]))
        assert state["averaged"] == updates


def test_the_model_holds_its_averages_for_a_while_and_then_every_bit_of_its_own() -> None:
    model = small()
    options = OptimOptions(lr=0.1, average=AverageOptions(0.9, warmup=0))
    optimizer = build_optimizer(model, options)
    materialise_state(optimizer, options)
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    own = [parameter.detach().clone() for parameter in model.parameters()]
    averages = [optimizer.state[parameter]["average"].clone() for parameter in model.parameters()]
    assert not torch.equal(own[0], averages[0])
    with averaged(model, optimizer):
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), averages, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), own, strict=True))
    kept = [optimizer.state[parameter]["average"] for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(kept, averages, strict=True))


def test_an_average_that_has_not_begun_follows_the_weights_that_are_loaded() -> None:
    model = small()
    options = OptimOptions(average=AverageOptions())
    optimizer = build_optimizer(model, options)
    materialise_state(optimizer, options)
    nn.init.ones_(model[0].weight)
    restore_options(optimizer, model, options)
    assert torch.equal(optimizer.state[model[0].weight]["average"], model[0].weight)


# ----------------------------------------------------------------------------------------------------------- in a run

AVERAGE = "optim.average={decay: 0.8, warmup: 0, validate: true}"
RUN = (AVERAGE, "steps=6", "save_every=2", "validate_every=3", "optim.parts=[{match: '^encoders', freeze: true}]")


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average on one process; its encoders are frozen."""
    return train_here(recipe, f"run={tmp_path_factory.mktemp('average')}", *RUN)


def state(path: Path, *, average: bool) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint, or their averages."""
    model = tiny_model()
    checkpoint.load_weights(checkpoint.find(path), model)
    if average:
        checkpoint.load_averages(checkpoint.find(path), model)
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_average_is_that_of_the_weights_in_the_checkpoints(recipe: Path, tmp_path: Path) -> None:
    run = train_here(recipe, f"run={tmp_path}", *RUN, "save_every=1", "validate_every=0", "steps=4")
    theirs = AveragedModel(tiny_model(), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for path in checkpoint.newest(run, 4):
        model = tiny_model()
        checkpoint.load_weights(path, model)
        theirs.update_parameters(model)
    for name, tensor in state(run, average=True).items():
        torch.testing.assert_close(tensor, theirs.module.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_what_does_not_train_is_its_own_average(run: Path) -> None:
    weights, averages = state(run, average=False), state(run, average=True)
    differing = {name for name, tensor in weights.items() if not torch.equal(tensor, averages[name])}
    assert differing == {name for name, _ in tiny_model().named_parameters() if not name.startswith("encoders")}


@pytest.mark.slow
def test_averaging_and_validating_the_average_changes_nothing_in_the_training(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    for precision, averaging in (("fp32", run), ("bf16", None)):
        common = (*RUN[1:], f"precision={precision}")
        if averaging is None:
            averaging = train_here(recipe, f"run={tmp_path / 'averaging'}", *common, AVERAGE)
        plain = train_here(recipe, f"run={tmp_path / precision}", *common, "validate_every=0")
        assert losses(averaging) == losses(plain)
        assert same(state(averaging, average=False), state(plain, average=False))
        # Another loss than that of the weights, which copies in bf16 that were gathered before would give again.
        own, of_average = losses(averaging, "validation_loss"), losses(averaging, "average/validation_loss")
        assert list(own) == list(of_average) == [3, 6]
        assert all(abs(own[step] - of_average[step]) > 1e-3 for step in own)


def test_the_validation_loss_of_the_average_is_that_of_its_export(run: Path, recipe: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "export", average=True)
    assert same(load_trained(exported).model.state_dict(), state(run, average=True))
    changes = (f"run={tmp_path / 'run'}", "optim.lr=0", "steps=1", f"init_from={exported}")
    assert losses(train_here(recipe, *changes), "validation_loss")[1] == pytest.approx(
        losses(run, "average/validation_loss")[6], rel=1e-6
    )


def test_the_command_exports_weights_or_their_average(run: Path, tmp_path: Path) -> None:
    for name, options in (("weights", []), ("averages", ["--average"])):
        result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        found = load_file(tmp_path / name / "model.safetensors")
        assert same(found, state(run, average=name == "averages"))


def test_what_holds_no_averages_says_so(run: Path, recipe: Path, tmp_path: Path) -> None:
    plain = train_here(recipe, f"run={tmp_path / 'plain'}", "steps=1")
    for path in (plain, export_run(run, tmp_path / "export")):
        with pytest.raises(CheckpointError, match=r"holds no averages: .*`optim\.average`"):
            export_run(path, tmp_path / "nothing", average=True)
    assert not (tmp_path / "nothing").exists()


def test_one_process_resumes_with_the_same_bits_of_the_average(run: Path, recipe: Path, tmp_path: Path) -> None:
    forked = fork_run(run, tmp_path / "run", step=2)
    train_here(recipe, f"run={forked}", *RUN)
    assert same(state(forked, average=True), state(run, average=True))
    for figure in ("loss", "validation_loss", "average/validation_loss"):
        assert losses(forked, figure) == losses(run, figure)


@pytest.mark.slow
def test_two_processes_average_as_one_and_go_on_from_what_one_saved(run: Path, recipe: Path, tmp_path: Path) -> None:
    forked, two, bf16 = fork_run(run, tmp_path / "forked", step=2), tmp_path / "two", tmp_path / "bf16"
    train_together(
        tmp_path,
        2,
        [
            [str(recipe), f"run={forked}", *RUN],
            [str(recipe), f"run={two}", *RUN],
            [str(recipe), f"run={bf16}", *RUN, "precision=bf16"],
        ],
    )
    expected, validation = state(run, average=True), losses(run, "average/validation_loss")
    for other, bound in ((forked, 1e-5), (two, 1e-5), (bf16, 5e-3)):
        assert losses(other, "average/validation_loss") == pytest.approx(validation, rel=bound)
        for name, tensor in state(other, average=True).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound)


def test_an_average_may_begin_in_a_run_or_with_a_stage_and_starts_at_the_weights_there(
    recipe: Path, tmp_path: Path
) -> None:
    changes = (f"run={tmp_path / 'run'}", "packing.window=2", "save_every=1")
    train_here(recipe, *changes, "steps=2")
    run = train_here(recipe, *changes, "steps=3", AVERAGE)
    assert same(state(run, average=True), state(run, average=False))  # after one update they are the same
    stages = [
        {"steps": 3, "optim": {"parts": [{"match": "^decoder", "freeze": True}], "average": {}}},
        {"steps": 1, "optim": {"average": {}}},
        {"steps": 1, "optim": {"average": None, "kind": "muon"}},
    ]
    staged = (f"run={tmp_path / 'staged'}", "packing.window=2", "save_every=1", "steps=null")
    run = train_here(recipe, *staged, f"stages={json.dumps(stages)}")
    at = run / "checkpoints/step-00000004"
    weights, averages = state(at, average=False), state(at, average=True)
    differing = {name for name, tensor in weights.items() if not torch.equal(tensor, averages[name])}
    assert {name.split(".")[0] for name in differing} == {"encoders", "adapters"}
    with pytest.raises(CheckpointError, match="holds no averages"):
        state(run, average=True)


# --------------------------------------------------------------------------------------------------- over checkpoints


def test_the_mean_over_checkpoints_is_that_of_torch(run: Path) -> None:
    theirs, ours = AveragedModel(tiny_model(), use_buffers=True), tiny_model()
    paths = checkpoint.newest(run, 3)
    assert [path.name for path in paths] == ["step-00000002", "step-00000004", "step-00000006"]
    for path in paths:
        model = tiny_model()
        checkpoint.load_weights(path, model)
        theirs.update_parameters(model)
    checkpoint.load_mean(paths, ours)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.module.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert not same(ours.state_dict(), state(run, average=False))


def test_more_checkpoints_than_there_are_are_refused_with_their_number(run: Path) -> None:
    for count in (0, 4):
        with pytest.raises(
            CheckpointError, match=f"has 3 checkpoints and {count} were asked for; `save_every` and `keep`"
        ):
            checkpoint.newest(run, count)
