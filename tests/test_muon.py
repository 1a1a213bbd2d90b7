"""Muon: the numbers of its update, what it takes, sharded and resumed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from mm.train import checkpoint
from mm.train.checkpoint import CheckpointError
from mm.train.muon import QUINTIC, Muon, orthogonalise
from mm.train.optim import OptimOptions, Part, build_optimizer, freeze
from mm.train.parallel import leave_world
from tests.small_world import fork_run, losses, tiny_model, train_here, train_together

pytestmark = pytest.mark.timeout(600)

torch.set_num_threads(1)

SIZES = (48, 96, 50, 7, 65, 1)
"""Widths of a chain of linear layers, tall and wide, that no number of processes divides."""


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairwise(SIZES)))


def muon(model: nn.Module, dtype: torch.dtype = torch.float32, **changes: Any) -> Muon:
    options = {"kind": "muon", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, **changes}
    return Muon([{"params": list(model.parameters()), **options}], fused=False, dtype=dtype)


def gradient(number: int, step: int, parameter: Tensor) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """With gradients drawn at random, the same however the model is sharded."""
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            whole = gradient(number, step, parameter)
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = whole
        optimizer.step()


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 8)])
def test_singular_vectors_stay_and_singular_values_go_five_times_through_the_quintic(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    a, b, c = QUINTIC
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalise(matrix, torch.float64), left @ values.diag() @ right)
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_updates_are_those_of_torch_bit_by_bit() -> None:
    ours, theirs = chain(), chain()
    take_steps(ours, muon(ours, torch.bfloat16))
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(theirs, torch.optim.Muon(theirs.parameters(), **options))
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_the_first_update_is_as_large_as_adamw_s_so_that_one_rate_fits_both(shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0], bias=False)
    before = model.weight.detach().clone()
    take_steps(model, muon(model, lr=1.0, weight_decay=0.0), steps=1)
    assert float((model.weight.detach() - before).square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("fused", [True, False])
def test_the_rest_is_updated_as_torch_s_adamw_does(fused: bool) -> None:
    ours, theirs = chain(), chain()
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    group = {"params": list(ours.parameters()), "kind": "adamw", **options}
    take_steps(ours, Muon([group], fused, torch.float32))
    take_steps(theirs, torch.optim.AdamW(theirs.parameters(), fused=fused, **options))
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    model = chain()
    before = model[1].weight.detach().clone()
    optimizer = muon(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    assert torch.equal(before, model[1].weight)
    assert set(optimizer.state) == {model[0].weight}


# ------------------------------------------------------------------------------------------------------ what it takes


def kinds(options: OptimOptions) -> dict[str, str]:
    """Kind of optimizer by name of parameter."""
    model = tiny_model()
    freeze(model, options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, options).param_groups
    return {names[parameter]: group["kind"] for group in groups for parameter in group["params"]}


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    found = kinds(OptimOptions("muon"))
    taken = {name for name, kind in found.items() if kind == "muon"}
    shapes = {name: parameter.ndim for name, parameter in tiny_model().named_parameters()}
    in_blocks = re.compile(r"^(decoder|encoders)\..*\b(layers|blocks)\.\d+\.")
    assert taken == {name for name in found if shapes[name] == 2 and in_blocks.search(name)}
    assert len([name for name in taken if name.startswith("decoder.layers.0.")]) == 7
    assert len([name for name in taken if name.startswith("encoders.image.tower.network.blocks.0.")]) == 4
    left = {name for name in found if shapes[name] == 2} - taken
    assert "decoder.embedding.weight" in left
    assert any(name.startswith("adapters.") for name in left)


def test_a_router_of_a_block_is_left_to_adamw() -> None:
    model = tiny_model([])
    block: Any = model.decoder.layers[0]
    block.feed_forward.router = nn.Linear(32, 4, bias=False)
    optimizer = build_optimizer(model, OptimOptions("muon"))
    (kind,) = [
        group["kind"]
        for group in optimizer.param_groups
        if any(parameter is block.feed_forward.router.weight for parameter in group["params"])
    ]
    assert kind == "adamw"


def test_experts_that_lie_in_one_parameter_are_updated_one_by_one() -> None:
    together, apart = nn.Linear(6, 15, bias=False), [nn.Linear(6, 5, bias=False) for _ in range(3)]
    with torch.no_grad():
        together.weight.copy_(torch.cat([one.weight for one in apart]))
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    stacked = {"params": [together.weight], "kind": "muon", "matrices": 3}
    single = {"params": [one.weight for one in apart], "kind": "muon"}
    common: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    for group, layers in ((stacked, [together]), (single, apart)):
        optimizer = Muon([group | common], fused=True, dtype=torch.float32)
        (torch.cat([layer(inputs) for layer in layers], dim=1).sin().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(together.weight, torch.cat([one.weight for one in apart]))


def test_the_optimizer_learns_from_the_model_how_many_experts_a_parameter_holds() -> None:
    model = tiny_model([], experts={"groups": {"text": 3, "image": 1}})
    options = OptimOptions("muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    counts = {
        names[parameter].removeprefix("decoder.layers.0.feed_forward.groups."): group["matrices"]
        for group in build_optimizer(model, options).param_groups
        for parameter in group["params"]
        if group["kind"] == "muon"
    }
    assert {counts[f"text.{part}.weight"] for part in ("gate", "up", "down")} == {3}
    assert counts["image.up.weight"] == 1
    assert "text.router.weight" not in counts


def test_a_part_may_go_by_another_optimizer() -> None:
    mixed = kinds(OptimOptions("muon", parts=[Part("^encoders", kind="adamw")]))
    assert {name.split(".")[0] for name, kind in mixed.items() if kind == "muon"} == {"decoder"}
    only = kinds(OptimOptions("adamw", parts=[Part("^encoders", kind="muon")]))
    assert {name.split(".")[0] for name, kind in only.items() if kind == "muon"} == {"encoders"}


def test_without_matrices_for_muon_the_optimizer_is_torch_s_adamw() -> None:
    options = OptimOptions("muon", parts=[Part("^(encoders|decoder)", freeze=True)])
    model = tiny_model()
    freeze(model, options)
    assert type(build_optimizer(model, options)) is torch.optim.AdamW


# ----------------------------------------------------------------------------------------------------------- sharded


def take_sharded_steps(rank: int, size: int, folder: str) -> None:
    """One of `size` processes; the weights after three steps in two precisions."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh, weights = init_device_mesh("cpu", (size,)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = chain()
        fully_shard(model, mesh=mesh)
        take_steps(model, muon(model, dtype))
        weights.append([whole(parameter) for parameter in model.parameters()])
        del model
    torch.save(weights, f"{folder}/rank{rank}")
    dist.barrier()
    leave_world()


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_sharded_is_updated_bit_by_bit_as_on_one_process(size: int, tmp_path: Path) -> None:
    spawn(take_sharded_steps, args=(size, str(tmp_path)), nprocs=size)
    expected = []
    for dtype in (torch.float32, torch.bfloat16):
        model = chain()
        take_steps(model, muon(model, dtype))
        expected.append([whole(parameter) for parameter in model.parameters()])
    assert not torch.equal(expected[0][0], expected[1][0])
    for rank in range(size):
        found = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert all(
            torch.equal(one, other)
            for ours, theirs in zip(found, expected, strict=True)
            for one, other in zip(ours, theirs, strict=True)
        )


# ----------------------------------------------------------------------------------------------------------- in a run

RUN = ("optim.kind=muon", "steps=8", "save_every=2")


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Muon on one process."""
    return train_here(recipe, f"run={tmp_path_factory.mktemp('muon')}", *RUN)


def test_a_run_with_muon_lowers_its_loss_by_other_steps_than_adamw(run: Path, recipe: Path, tmp_path: Path) -> None:
    found, adamw = losses(run), losses(train_here(recipe, f"run={tmp_path}", "steps=2"))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[1] == adamw[1]
    assert found[2] != adamw[2]


def test_one_process_resumes_a_run_with_muon_with_the_same_bits(run: Path, recipe: Path, tmp_path: Path) -> None:
    forked = fork_run(run, tmp_path / "run", step=4)
    train_here(recipe, f"run={forked}", *RUN)
    assert losses(forked) == losses(run)


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_from_what_one_saved(run: Path, recipe: Path, tmp_path: Path) -> None:
    forked, two, bf16 = fork_run(run, tmp_path / "forked", step=4), tmp_path / "two", tmp_path / "bf16"
    train_together(
        tmp_path,
        2,
        [
            [str(recipe), f"run={forked}", *RUN],
            [str(recipe), f"run={two}", *RUN],
            [str(recipe), f"run={bf16}", *RUN, "precision=bf16"],
        ],
    )
    assert losses(forked) == pytest.approx(losses(run), rel=1e-5)
    assert losses(two) == pytest.approx(losses(run), rel=1e-5)
    assert losses(bf16) == pytest.approx(losses(run), rel=5e-3)
    shrunk = fork_run(two, tmp_path / "shrunk", step=4)
    train_here(recipe, f"run={shrunk}", *RUN)
    assert losses(shrunk) == pytest.approx(losses(run), rel=1e-5)


def test_a_matrix_that_is_sharded_by_columns_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = chain()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"sharded by rows, and one is placed \(Shard\(dim=1\),\)"):
        take_steps(model, muon(model), steps=1)
    del model
    leave_world()


def test_another_optimizer_needs_a_stage_of_its_own(recipe: Path, tmp_path: Path) -> None:
    plain = (f"run={tmp_path / 'run'}", "packing.window=2", "steps=2")
    train_here(recipe, *plain)
    with pytest.raises(
        CheckpointError, match=r"lacks \d+ entries .*layers\.0\.\S+momentum'.*optim\.kind.* add a stage"
    ):
        train_here(recipe, *plain, "steps=4", "optim.kind=muon")
    stages = [{"steps": 2}, {"steps": 2, "optim": {"kind": "muon"}}, {"steps": 2}]
    train_here(recipe, *plain[:2], "steps=null", f"stages={json.dumps(stages)}")
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert checkpoint.read_position(checkpoint.find(tmp_path / "run")).finished == ((2, 8), (4, 8))
