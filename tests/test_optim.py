"""Parameter groups, optimizer state, gradient clipping, plain and sharded; and the learning rate over a run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.optim.lr_scheduler import LRScheduler
from transformers import optimization

from mm import configure
from mm.configure import RecipeError
from mm.encoders.vision import TimmEncoder
from mm.train.average import AverageOptions
from mm.train.optim import (
    WRAPPERS,
    OptimOptions,
    Part,
    build_optimizer,
    clip_gradients,
    freeze,
    materialise_state,
    restore_options,
    set_learning_rate,
)
from mm.train.parallel import leave_world
from mm.train.schedule import ScheduleOptions, learning_rate_factor

torch.set_num_threads(1)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "a_token_that_this_size_does_not_have"}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x + self.class_token[0] + self.pos_embed[0].mean(0)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Tower()
        self.adapter = nn.Linear(4, 4)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.head(self.adapter(self.encoder(x)) + self.embed(tokens))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, tokens = torch.randn(8, 4, generator=generator), torch.randint(6, (8,), generator=generator)
    return model(x, tokens).logsumexp(1).square().sum()


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


# ----------------------------------------------------------------------------------------------------------- parts


def test_the_first_part_that_matches_decides():
    model = Model()
    options = OptimOptions(
        lr=1e-4,
        weight_decay=0.1,
        parts=[Part(r"^encoder\.block", lr=1e-3), Part("^encoder", lr=1e-5, weight_decay=0.3)],
    )
    groups = groups_by_name(model, build_optimizer(model, options))

    assert groups["encoder.block.weight"]["lr"] == 1e-3
    assert groups["encoder.block.weight"]["weight_decay"] == 0.1
    assert groups["encoder.norm.weight"]["lr"] == 1e-5
    assert groups["adapter.weight"]["lr"] == 1e-4


def test_only_matrices_that_multiply_activations_decay():
    model = Model()
    groups = groups_by_name(model, build_optimizer(model, OptimOptions(weight_decay=0.1)))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.1}

    assert decayed == {"encoder.block.weight", "adapter.weight"}
    assert set(groups) == {name for name, _ in model.named_parameters()}


def test_a_part_s_decay_holds_for_its_matrices_only():
    model = Model()
    options = OptimOptions(parts=[Part("^encoder", weight_decay=0.5)])
    groups = groups_by_name(model, build_optimizer(model, options))
    assert groups["encoder.block.weight"]["weight_decay"] == 0.5
    assert groups["encoder.block.bias"]["weight_decay"] == groups["encoder.pos_embed"]["weight_decay"] == 0


def test_frozen_parameters_do_not_train_and_fixed_ones_stay_fixed():
    model = Model()
    model.adapter.bias.requires_grad_(False)
    options = OptimOptions(parts=[Part("^encoder", freeze=True)])
    freeze(model, options)
    groups = groups_by_name(model, build_optimizer(model, options))

    assert set(groups) == {"adapter.weight", "embed.weight"}
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_names_are_those_without_the_wrappers_of_activation_checkpointing():
    model = Model()
    model.encoder = checkpoint_wrapper(model.encoder)  # type: ignore[assignment]
    options = OptimOptions(weight_decay=0.1, parts=[Part(r"^encoder\.block\.weight$", lr=1.0)])
    groups = groups_by_name(model, build_optimizer(model, options))
    assert groups["encoder._checkpoint_wrapped_module.block.weight"]["lr"] == 1.0
    assert groups["encoder._checkpoint_wrapped_module.pos_embed"]["weight_decay"] == 0


def test_a_pattern_that_matches_nothing_is_an_error_that_names_what_there_is():
    with pytest.raises(RecipeError, match=r"'\^decoder' matches no parameter.*encoder\.\* \(6\), adapter\.\* \(2\)"):
        freeze(Model(), OptimOptions(parts=[Part("^decoder", freeze=True)]))


def test_a_part_that_earlier_parts_leave_nothing_is_an_error():
    with pytest.raises(RecipeError, match="earlier parts match everything"):
        freeze(Model(), OptimOptions(parts=[Part("^encoder", lr=1.0), Part("norm", freeze=True)]))


def test_a_pattern_that_is_no_regular_expression_is_an_error():
    with pytest.raises(RecipeError, match=r"'\(decoder' is no regular expression"):
        Part("(decoder")


def test_freezing_everything_is_an_error():
    model, options = Model(), OptimOptions(parts=[Part("", freeze=True)])
    freeze(model, options)
    with pytest.raises(RecipeError, match="nothing to train"):
        build_optimizer(model, options)


def test_an_optimizer_is_not_built_before_freezing():
    with pytest.raises(ValueError, match=r"class_token is to be frozen"):
        build_optimizer(Model(), OptimOptions(parts=[Part("^encoder", freeze=True)]))


def test_the_options_are_a_schema_for_recipes():
    recipe = {"kind": "muon", "betas": [0.8, 0.9], "parts": [{"match": "^a", "lr": 1e-3}], "average": {"decay": 0.5}}
    options = configure.typed(OptimOptions, recipe)
    assert options == OptimOptions(
        "muon", betas=(0.8, 0.9), parts=[Part("^a", lr=1e-3)], average=AverageOptions(decay=0.5)
    )
    assert configure.typed(OptimOptions, {"average": {}}).average == AverageOptions()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"kind": "lion"}, "`kind` is 'lion'; expected one of 'adamw', 'muon'"),
        ({"parts": [{"match": "a", "kind": "sgd"}]}, r"`parts\.0\.kind` is 'sgd'; expected one of 'adamw', 'muon'"),
        (
            {"parts": [{"match": "a", "layer_decay": 1.5}]},
            r"`parts\.0\.layer_decay` is 1\.5; expected a number from 0 to 1",
        ),
        ({"parts": [{"match": "a", "lr": -1.0}]}, r"`parts\.0\.lr` is -1\.0; expected a number from 0 to 1000"),
        ({"lr": -1.0}, r"`lr` is -1\.0; expected a number from 0 to 1000"),
        ({"betas": [0.9, 1.0]}, r"optim\.betas is \(0\.9, 1\.0\) and must be at least 0 and below 1, both"),
        ({"momentum": 1.0}, r"optim\.momentum is 1\.0 and must be at least 0 and below 1"),
        ({"clip": 0.0}, r"`clip` is 0\.0; expected a number above 0, or \.inf for no bound"),
        ({"average": {"decay": 1.0}}, r"`average`: optim\.average\.decay is 1\.0 and must be at least 0 and below 1"),
        ({"average": {"warmup": -1.0}}, r"`average\.warmup` is -1\.0; expected a number from 0 to 1e\+06"),
        ({"average": {"rate": 1}}, r"`average\.rate`: unknown key\. Allowed: decay, validate, warmup"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_what_is_allowed(recipe, said):
    with pytest.raises(RecipeError, match=said):
        configure.typed(OptimOptions, recipe)


def test_the_rate_of_a_tower_falls_with_depth_as_timm_has_it():
    encoder = TimmEncoder("test_vit", pretrained=False, image_size=32)
    groups = groups_by_name(encoder, build_optimizer(encoder, OptimOptions(parts=[Part("", lr=0.1, layer_decay=0.75)])))
    network = encoder.tower.network
    scales = {
        p: group["lr_scale"] for group in param_groups_layer_decay(network, layer_decay=0.75) for p in group["params"]
    }
    for name, parameter in encoder.named_parameters():
        assert groups[name]["peak_lr"] == groups[name]["lr"] == pytest.approx(0.1 * scales[parameter], rel=1e-12)
    assert groups["tower.network.cls_token"]["lr"] == pytest.approx(0.1 * 0.75**6)  # lr · γ^(L − i), six blocks
    assert len({group["lr"] for group in groups.values()}) == 7


def test_the_rate_falls_in_the_part_that_says_so_and_in_sharded_and_wrapped_towers_too(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    encoder = TimmEncoder("test_vit", pretrained=False, image_size=32)
    options = OptimOptions(lr=1.0, parts=[Part(r"blocks\.[0-4]\.", layer_decay=0.5)])
    plain = groups_by_name(encoder, build_optimizer(encoder, options))
    blocks = encoder.tower.network.blocks
    for number, block in enumerate(blocks):
        blocks[number] = fully_shard(checkpoint_wrapper(block), mesh=init_device_mesh("cpu", (1,)))
    sharded = groups_by_name(encoder, build_optimizer(encoder, options))
    leave_world()
    assert plain["tower.network.blocks.3.norm1.weight"]["lr"] == 0.25
    assert plain["tower.network.blocks.5.norm1.weight"]["lr"] == plain["tower.network.pos_embed"]["lr"] == 1
    assert {WRAPPERS.sub("", name): group["lr"] for name, group in sharded.items()} == {
        name: group["lr"] for name, group in plain.items()
    }


def test_the_schedule_multiplies_the_peak_of_every_group():
    model = Model()
    optimizer = build_optimizer(model, OptimOptions(lr=1e-4, parts=[Part("^adapter", lr=1e-2)]))
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        groups = groups_by_name(model, optimizer)
        assert groups["embed.weight"]["lr"] == factor * 1e-4
        assert groups["adapter.weight"]["lr"] == factor * 1e-2


# ----------------------------------------------------------------------------------------------------------- state


def step_twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_materialised_state_is_the_one_that_adamw_makes_and_changes_no_step(fused):
    plain, materialised = Model(), Model()
    optimizers = [build_optimizer(model, OptimOptions(lr=0.1)) for model in (plain, materialised)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["fused"] = fused
    before = copy.deepcopy(materialised.state_dict())
    materialise_state(optimizers[1], OptimOptions())
    assert all(torch.equal(before[name], value) for name, value in materialised.state_dict().items())
    created = {name: list(optimizers[1].state[p]) for name, p in materialised.named_parameters()}

    for model, optimizer in zip((plain, materialised), optimizers, strict=True):
        step_twice(model, optimizer)
    for (name, one), other in zip(plain.named_parameters(), materialised.parameters(), strict=True):
        assert torch.equal(one, other)
        assert created[name] == list(optimizers[0].state[one])
        for key, value in optimizers[0].state[one].items():
            assert value.dtype == optimizers[1].state[other][key].dtype
            assert torch.equal(value, optimizers[1].state[other][key])


def test_every_trainable_parameter_has_state_before_its_first_gradient():
    model = Model()
    optimizer = build_optimizer(model, OptimOptions())
    materialise_state(optimizer, OptimOptions())
    get_state_dict(model, optimizer)  # which steps an optimizer that has no state
    assert set(optimizer.state) == set(model.parameters())
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_materialising_keeps_the_state_that_is_there():
    model = Model()
    optimizer = build_optimizer(model, OptimOptions())
    step_twice(model, optimizer)
    materialise_state(optimizer, OptimOptions())
    assert optimizer.state[model.adapter.weight]["step"] == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_resumed_run_keeps_its_moments_and_follows_the_rates_of_the_recipe_that_resumes_it(tmp_path: Path):
    regroupable = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Model()
    old = build_optimizer(model, OptimOptions(lr=1e-2, betas=(0.5, 0.6)))
    step_twice(model, old)
    save(get_state_dict(model, old, options=regroupable)[1], checkpoint_id=tmp_path)

    options = OptimOptions(lr=1e-4, weight_decay=0.7, parts=[Part("^encoder", lr=1e-5)])
    new = build_optimizer(model, options)
    materialise_state(new, options)
    weights, state = get_state_dict(model, new, options=regroupable)
    load(state, checkpoint_id=tmp_path)
    set_state_dict(model, new, model_state_dict=weights, optim_state_dict=state, options=regroupable)
    assert {group["lr"] for group in new.param_groups} == {1e-2}  # what torch does

    restore_options(new, model, options)
    groups = groups_by_name(model, new)
    assert groups["adapter.weight"]["lr"] == groups["adapter.weight"]["peak_lr"] == 1e-4
    assert groups["encoder.block.weight"]["lr"] == 1e-5
    assert groups["adapter.weight"]["betas"] == (0.9, 0.95)
    assert groups["adapter.weight"]["weight_decay"] == 0.7
    for parameter in model.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
        assert new.state[parameter]["step"] == 2


# -------------------------------------------------------------------------------------------------------- clipping


def test_the_norm_is_that_of_all_gradients_and_larger_ones_are_scaled_to_the_limit():
    model = Model()
    loss_of(model).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = clip_gradients(model.parameters(), 0.5)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(norm, gradients.norm())
    torch.testing.assert_close(clipped, gradients * (0.5 / norm), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [1e9, math.inf])
def test_gradients_below_the_limit_are_left_alone(limit):
    model = Model()
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip_gradients(model.parameters(), limit)
    assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    model = Model()
    loss_of(model).backward()
    assert model.adapter.bias.grad is not None
    model.adapter.bias.grad[1] = math.nan
    assert not clip_gradients(model.parameters(), 1.0).isfinite()


def test_without_gradients_the_norm_is_zero():
    assert clip_gradients(Model().parameters(), 1.0) == 0


def sharded_run(rank: int, size: int, folder: str) -> None:
    """One of `size` processes that train a model whose encoder stays unsharded and whose rest is sharded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    train_sharded(rank, size, folder)
    dist.barrier()
    leave_world()


def train_sharded(rank: int, size: int, folder: str) -> None:
    """Three steps; writes the norms and the whole weights."""
    model = Model()
    options = OptimOptions(lr=0.05, weight_decay=0.1, parts=[Part("^encoder", lr=0.01)])
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model, mesh=mesh, ignored_params=set(model.encoder.parameters()))
    optimizer = build_optimizer(model, options)
    materialise_state(optimizer, OptimOptions())
    norms = []
    for seed in range(3):
        loss_of(model, seed).backward()
        norms.append(clip_gradients(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert any(isinstance(p, DTensor) for p in model.parameters())
    assert not any(isinstance(p, DTensor) for p in model.encoder.parameters())
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    torch.save({"norms": norms, "weights": weights}, f"{folder}/rank{rank}")


@pytest.mark.slow
def test_sharded_training_equals_that_of_one_process(tmp_path: Path):
    spawn(sharded_run, args=(2, str(tmp_path)), nprocs=2)

    model = Model()
    options = OptimOptions(lr=0.05, weight_decay=0.1, parts=[Part("^encoder", lr=0.01)])
    optimizer = build_optimizer(model, options)
    norms = []
    for seed in range(3):
        loss_of(model, seed).backward()
        norms.append(clip_gradients(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        torch.testing.assert_close(found["norms"], norms)
        torch.testing.assert_close(found["weights"], dict(model.named_parameters()), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- schedule


def rates(total: int, **options) -> list[float]:
    return [learning_rate_factor(ScheduleOptions(**options), step, total) for step in range(total)]


def test_warm_up_rises_in_equal_steps_from_above_zero_to_the_peak():
    assert rates(10, kind="constant", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert rates(10, kind="constant", warmup=0.2)[:3] == [0.5, 1, 1]


def test_cosine_is_half_way_in_the_middle():
    assert rates(5, kind="cosine", warmup=0, floor=0.2) == pytest.approx(
        [0.2 + 0.4 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    )
    assert rates(5, kind="cosine", warmup=0, floor=0.2)[2] == pytest.approx(0.6)


def test_linear_falls_in_equal_steps():
    assert rates(6, kind="linear", warmup=2, floor=0.0) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_stays_at_the_peak_until_the_last_part():
    assert rates(10, kind="wsd", warmup=1, decay=0.4, floor=0.2) == pytest.approx([1] * 6 + [0.8, 0.6, 0.4, 0.2])
    assert rates(4, kind="wsd", warmup=1, decay=0.0) == [1, 1, 1, 1]


@given(
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
    total=st.integers(2, 300),
    warmup=st.one_of(st.integers(1, 100), st.floats(0, 0.5)),
    decay=st.floats(0.1, 0.5),
    floor=st.floats(0, 1),
)
def test_every_schedule_reaches_the_peak_ends_at_the_floor_and_never_jumps(kind, total, warmup, decay, floor):
    warmup_steps = round(warmup * total) if warmup < 1 else warmup
    falling = round(decay * total) if kind == "wsd" else total - max(warmup_steps, 1)
    assume(1 <= falling <= total - max(warmup_steps, 1))
    factors = rates(total, kind=kind, warmup=warmup, decay=decay, floor=floor)

    assert factors[0] > 0 or total == 1
    assert max(factors) == pytest.approx(1)
    assert factors[-1] == pytest.approx(floor)
    assert learning_rate_factor(ScheduleOptions(kind, warmup, decay, floor), total + 50, total) == pytest.approx(floor)
    steepest = max(1 / max(warmup_steps, 1), (1 - floor) * math.pi / 2 / falling)
    assert all(abs(after - before) <= steepest + 1e-9 for before, after in pairwise(factors))
    assert all(after <= before + 1e-12 for before, after in pairwise(factors[warmup_steps:]))


# What others' schedulers do in step s ours does in step s − 1: theirs waste the first on a rate of zero, and come to
# the floor after the last. transformers' wsd starts its warm-up at the floor.
OTHERS = {
    "cosine": (
        {"warmup": 7, "floor": 0.0},
        lambda optimizer: optimization.get_cosine_schedule_with_warmup(optimizer, 7, 50),
    ),
    "cosine to a floor": (
        {"kind": "cosine", "warmup": 7, "floor": 0.2},
        lambda optimizer: optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 50, min_lr_rate=0.2),
    ),
    "linear": (
        {"kind": "linear", "warmup": 7, "floor": 0.0},
        lambda optimizer: optimization.get_linear_schedule_with_warmup(optimizer, 7, 50),
    ),
    "constant": (
        {"kind": "constant", "warmup": 7},
        lambda optimizer: optimization.get_constant_schedule_with_warmup(optimizer, 7),
    ),
    "wsd": (
        {"kind": "wsd", "warmup": 7, "decay": 0.3, "floor": 0.1, "start": 0.1},
        lambda optimizer: optimization.get_wsd_schedule(optimizer, 7, 15, 50, decay_type="linear", min_lr_ratio=0.1),
    ),
    "wsd, 1-sqrt": (
        {"kind": "wsd", "warmup": 7, "decay": 0.3, "floor": 0.1, "start": 0.1, "decay_shape": "1-sqrt"},
        lambda optimizer: optimization.get_wsd_schedule(optimizer, 7, 15, 50, decay_type="1-sqrt", min_lr_ratio=0.1),
    ),
    "warmed up again": (
        {"kind": "constant", "warmup": 7, "start": 0.1},
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=7),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_schedules_are_those_of_transformers_and_torch_a_step_earlier(name):
    options, make = OTHERS[name]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: LRScheduler = make(optimizer)
    theirs = []
    for _ in range(50):
        optimizer.step()
        scheduler.step()
        theirs.append(scheduler.get_last_lr()[0])
    assert rates(50, **options) == pytest.approx(theirs, abs=1e-12)


def test_wsd_comes_down_by_the_root_of_progress():
    expected = [1] * 6 + [0.2 + 0.8 * (1 - math.sqrt(step / 4)) for step in (1, 2, 3, 4)]
    assert rates(10, kind="wsd", warmup=1, decay=0.4, floor=0.2, decay_shape="1-sqrt") == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_trained_model_is_warmed_up_again_from_where_it_ended_to_a_fraction(kind):
    factors = rates(40, kind=kind, warmup=5, start=0.1, peak=0.6, floor=0.1)
    assert factors[:5] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert max(factors) == pytest.approx(0.6)
    assert factors[-1] == pytest.approx(0.6 if kind == "constant" else 0.1)
    shape = [(factor - 0.1) / 0.5 for factor in factors[5:]]
    assert shape == pytest.approx(rates(40, kind=kind, warmup=5, floor=0.0)[5:])


def test_runs_that_are_too_short_and_shares_that_are_none_are_refused():
    with pytest.raises(RecipeError, match="5 steps has no room for 100 steps of warm-up"):
        rates(5, warmup=100)
    with pytest.raises(RecipeError, match="6 of decay"):
        rates(10, kind="wsd", warmup=5, decay=0.6)
    with pytest.raises(RecipeError, match="floor is 3"):
        ScheduleOptions(floor=3)
    with pytest.raises(RecipeError, match=r"warmup is 2\.5"):
        ScheduleOptions(warmup=2.5)
    with pytest.raises(RecipeError, match=r"schedule\.kind is 'cosinus'; allowed: cosine, linear, wsd, constant"):
        ScheduleOptions(kind="cosinus")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"schedule\.decay_shape is 'sqrt'; allowed: linear, 1-sqrt"):
        ScheduleOptions(decay_shape="sqrt")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"schedule\.start is 0\.5 and must be at most schedule\.peak, which is 0\.3"):
        ScheduleOptions(start=0.5, peak=0.3)
    with pytest.raises(
        RecipeError, match=r"schedule\.floor is 0\.1 and must be at most schedule\.peak, which is 0\.05"
    ):
        ScheduleOptions(peak=0.05)
    assert rates(3, kind="constant", peak=0.05, warmup=0) == [0.05] * 3
