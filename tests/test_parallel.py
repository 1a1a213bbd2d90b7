"""Sharding, activation checkpointing and compilation: what they change is memory and time, never losses or weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from mm.configure import RecipeError
from mm.layers.norm import rms_norm
from mm.layers.rope import Rope, rotate, rotation
from mm.model.multimodal import MultimodalLM, build_model
from mm.packing.materialise import MicroStep
from mm.train import checkpoint
from mm.train.dataset import PlannedData, open_data
from mm.train.parallel import ParallelOptions, World, leave_world, parallelise
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests.small_world import bytes_kept, losses, tiny_model, train_here, train_together

pytestmark = pytest.mark.timeout(900)

CPU = torch.device("cpu")
STEPS = "steps=4"
FROM_SCRATCH = ("steps=1", "optim.lr=0.0")

ON_TWO: dict[str, tuple[str, ...]] = {
    "gathered weights are kept": ("parallel.reshard_after_forward=never",),
    "gathered weights are always let go": ("parallel.reshard_after_forward=always",),
    "blocks keep their input": ("parallel.activations=full",),
    "blocks keep products": ("parallel.activations=selective", "parallel.reshard_after_forward=always"),
    "two whole models": ("parallel.replicate=2",),
}
ON_FOUR: dict[str, tuple[str, ...]] = {
    "sharded over all": (),
    "two groups of two": ("parallel.replicate=2", "parallel.activations=full"),
    "two groups of two, Muon": ("parallel.replicate=2", "optim.kind=muon"),
}


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with: one process, nothing sharded."""
    return train_here(recipe, f"run={tmp_path_factory.mktemp('plain')}", STEPS)


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on two processes, by name, and `from scratch`, which saved the weights it began with."""
    return run_on(2, recipe, tmp_path_factory.mktemp("two"), ON_TWO | {"from scratch": FROM_SCRATCH})


@pytest.fixture(scope="module")
def on_four(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_on(4, recipe, tmp_path_factory.mktemp("four"), ON_FOUR)


def run_on(processes: int, recipe: Path, folder: Path, changed: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    runs = {name: folder / name.replace(" ", "-") for name in changed}
    jobs = [[str(recipe), f"run={runs[name]}", STEPS, *options] for name, options in changed.items()]
    train_together(folder, processes, jobs)
    return runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    model = tiny_model()
    checkpoint.load_weights(checkpoint.find(run), model)
    return model.state_dict()


# ---------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_train_as_one(plain: Path, together: dict[str, Path], name: str) -> None:
    same_course(together[name], plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ON_FOUR if "Muon" not in name])
def test_four_processes_train_as_one(plain: Path, on_four: dict[str, Path], name: str) -> None:
    same_course(on_four[name], plain)


def same_course(run: Path, plain: Path) -> None:
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(run, "gradient_norm") == pytest.approx(losses(plain, "gradient_norm"), rel=1e-4)


@pytest.mark.slow
def test_muon_on_groups_of_processes_trains_as_on_one(recipe: Path, on_four: dict[str, Path], tmp_path: Path) -> None:
    alone = train_here(recipe, f"run={tmp_path}", STEPS, "optim.kind=muon")
    assert losses(on_four["two groups of two, Muon"]) == pytest.approx(losses(alone), rel=1e-5)


def test_sharded_weights_begin_as_those_of_one_process_bit_by_bit(recipe: Path, together: dict[str, Path]) -> None:
    loaded = Recipe.load(recipe)
    torch.manual_seed(loaded.seed)
    expected = build_model(loaded.model).state_dict()
    found = weights(together["from scratch"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    trained = weights(together["two whole models"])
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in trained.items())


def shard_what_the_first_has(rank: int, size: int, folder: str) -> None:
    """One of `size` processes, of which all but the first begin without weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    model = tiny_model(meta=rank != 0)
    parallelise(model, World(rank, size, CPU), torch.float32, ParallelOptions())
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        held = parameter.to_local().untyped_storage().nbytes()
        found[name] = (parameter.full_tensor().detach(), held)
    torch.save((found, dict(model.named_buffers())), f"{folder}/rank{rank}")
    dist.barrier()
    del model, parameter
    leave_world()


def test_a_process_that_begins_without_weights_ends_with_its_share_of_the_first_one_s(tmp_path: Path) -> None:
    spawn(shard_what_the_first_has, args=(2, str(tmp_path)), nprocs=2)
    expected = tiny_model()
    for rank in range(2):
        found, buffers = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        for name, parameter in expected.named_parameters():
            whole, held = found[name]
            assert torch.equal(whole, parameter), name
            rows = -(-len(parameter) // 2)
            assert held <= rows * parameter[0].numel() * 4, name
        assert buffers.keys() == dict(expected.named_buffers()).keys()
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in expected.named_buffers())


# --------------------------------------------------------------------------------------------------- what blocks keep


@pytest.fixture(scope="module")
def data(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedData:
    loaded = Recipe.load(recipe)
    folder = tmp_path_factory.mktemp("plan")
    return open_data(loaded, Blueprint.of(loaded), loaded.data.sources, folder, epochs=loaded.epochs)


def step(model: MultimodalLM, data: PlannedData) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss and gradients of a batch with every modality, and the bytes that the forward keeps."""
    batch = data.materialiser()[MicroStep(0, tuple(range(8)))]
    assert len(batch.media) == 3
    model(batch)  # the first pass derives what all batches share
    loss, kept = bytes_kept(lambda: model(batch).total)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], kept


def test_blocks_that_keep_less_give_the_same_bits(data: PlannedData) -> None:
    data.plan.ensure(8)
    found = {}
    for activations in ("none", "selective", "full"):
        model = tiny_model().train()
        parallelise(model, World(0, 1, CPU), torch.float32, ParallelOptions(activations=activations))
        found[activations] = step(model, data)
    loss, gradients, kept = found["none"]
    for activations in ("selective", "full"):
        assert torch.equal(found[activations][0], loss)
        assert len(found[activations][1]) == len(gradients)
        assert all(torch.equal(*pair) for pair in zip(found[activations][1], gradients, strict=True))
    assert found["full"][2] < found["selective"][2] < kept


def test_what_was_saved_with_checkpointing_is_loaded_without(together: dict[str, Path], plain: Path) -> None:
    found = weights(together["blocks keep their input"])
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- compilation


COMPUTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm": lambda x: rms_norm(x, x[0, 0], 1e-5),
    "rotation": lambda x: rotate(x, rotation(Rope(), torch.arange(len(x)), x.shape[-1], x.dtype)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_compiled_code_has_the_gradients_of_eager_code(name: str) -> None:
    """torch 2.11 gives others, silently, for an autograd function of our own that works in place."""
    inputs = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for run in (COMPUTED[name], torch.compile(COMPUTED[name], backend="eager")):
        leaf = inputs.clone().requires_grad_()
        run(leaf.sin()).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_compiled_blocks_give_the_losses_of_eager_ones_in_few_compilations(recipe: Path, tmp_path: Path) -> None:
    """32 batches. Three kinds of encoder blocks compile for one item and for any number, four parts of a decoder block
    for one number of documents, two of them again for any; and most of them again without gradients, to validate."""
    long = ("steps=16", "packing.batch=2")
    eager = losses(train_here(recipe, f"run={tmp_path / 'eager'}", *long))
    torch._dynamo.reset()
    counters.clear()
    options = ("parallel.compile=true", "parallel.activations=full")
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):  # or the rest would be eager, with a warning
        compiled = losses(train_here(recipe, f"run={tmp_path / 'compiled'}", *long, *options))
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 21


@pytest.mark.slow
def test_compiled_blocks_are_sharded_as_eager_ones_are(plain: Path, recipe: Path, tmp_path: Path) -> None:
    run = [str(recipe), f"run={tmp_path / 'run'}", STEPS, "parallel.compile=true", "parallel.activations=selective"]
    train_together(tmp_path, 2, [run])
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_groups_that_do_not_divide_the_processes_are_refused_with_those_that_do(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match=r"parallel\.replicate is 3, and 4 processes .* they do into 1, 2, 4"):
        train_here(recipe, f"run={tmp_path}", "parallel.replicate=3")


def test_offloading_without_a_gpu_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.offload .* there is no GPU here"):
        train_here(recipe, f"run={tmp_path}", "parallel.offload=true")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("parallel.replicate=0", "`parallel.replicate` is 0; expected a whole number from 1 to"),
        ("parallel.activations=some", "expected one of 'none', 'selective', 'full'"),
        ("parallel.reshard_after_forward=true", "expected one of 'default', 'always', 'never'"),
        ("parallel.replicas=2", "unknown key"),
    ],
)
def test_options_that_do_not_exist_are_refused_with_those_that_do(recipe: Path, option: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe, [option])
