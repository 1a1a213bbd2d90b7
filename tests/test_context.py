"""A stream over several devices is computed as on one: attention by heads, everything else by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from mm.configure import RecipeError
from mm.layers.attention import attend
from mm.layers.context import Context, check_heads
from mm.layers.layout import Layout, Share
from mm.packing.materialise import MicroStep
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.small_world import losses, seen, train_here, train_together

pytestmark = pytest.mark.timeout(600)

LENGTHS = [5, 1, 17, 9, 16]  # documents over every border of two and of four parts
STEPS = "steps=4"


# ---------------------------------------------------------------------------------------------------------- attention


def inputs(kv_heads: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (8, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend_in_parts(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    context, held = Context(size, group), Share(rank, size).of(sum(LENGTHS))
    for kv_heads in (8, 4, 2, 1):
        whole = q, k, v = inputs(kv_heads)
        mixed = context.attend(q[held], k[held], v[held], Layout.of(LENGTHS))
        mixed.square().sum().backward()
        gradients = [x.grad for x in whole]
        torch.save((mixed.detach(), gradients), f"{folder}/{kv_heads}-{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_attention_in_parts_is_attention_of_the_whole(tmp_path: Path, size: int) -> None:
    spawn(attend_in_parts, args=(size, str(tmp_path)), nprocs=size)
    for kv_heads in (8, 4, 2, 1):
        whole = q, k, v = inputs(kv_heads)
        expected = attend(q, k, v, Layout.of(LENGTHS))
        expected.square().sum().backward()
        parts = [torch.load(tmp_path / f"{kv_heads}-{rank}", weights_only=True) for rank in range(size)]
        torch.testing.assert_close(torch.cat([mixed for mixed, _ in parts]), expected.detach())
        for number, x in enumerate(whole):  # every device has the gradient of its tokens, and zero of the others'
            torch.testing.assert_close(sum(gradients[number] for _, gradients in parts), x.grad)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "able"), [(8, 2, "1, 2, 4, 8"), (12, 2, "1, 2, 4, 6, 12"), (6, 3, "1, 3, 6")]
)
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, able: str) -> None:
    with pytest.raises(
        ValueError, match=f"5 devices cannot share {heads} query and {kv_heads} key heads.*; {able} can"
    ):
        check_heads(5, heads, kv_heads)


# ------------------------------------------------------------------------------------------------------------ batches


def test_the_shares_of_a_batch_hold_every_label_once_and_only_items_that_reach_into_them(recipe: Path) -> None:
    data = planned(Recipe.load(recipe))
    step = MicroStep(0, (0, 1, 2, 3))
    whole = data.materialiser(capacity=128)[step]
    shares = [data.materialiser(128, Share(index, 4))[step] for index in range(4)]
    assert torch.equal(torch.stack([share.weights for share in shares]).sum(0), whole.weights)
    assert torch.equal(torch.stack([share.labels for share in shares]).amax(0), whole.labels)
    assert sum(share.real_tokens for share in shares) == whole.real_tokens
    for modality, media in whole.media.items():
        found = [share.media[modality] for share in shares if modality in share.media]
        assert {slot for part in found for slot in part.slots.tolist()} == set(media.slots.tolist())
    items = [sum(len(media.grids) for media in share.media.values()) for share in shares]
    assert max(items) < sum(len(media.grids) for media in whole.media.values())


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(recipe, f"run={tmp_path_factory.mktemp('plain')}", STEPS)


@pytest.fixture(scope="module")
def together(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in which two processes share each stream."""
    folder = tmp_path_factory.mktemp("together")
    runs = {name: folder / name for name in ("pair", "checkpointed")}
    shared = {name: [str(recipe), f"run={run}", STEPS, "parallel.context=2"] for name, run in runs.items()}
    train_together(folder, 2, [shared["pair"], [*shared["checkpointed"], "parallel.activations=full"]])
    return runs


@pytest.mark.parametrize("name", ["pair", "checkpointed"])
def test_processes_that_share_streams_train_as_one(plain: Path, together: dict[str, Path], name: str) -> None:
    same_course(together[name], plain)


@pytest.mark.slow
def test_two_pairs_train_as_one(plain: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "pairs"
    train_together(tmp_path, 4, [[str(recipe), f"run={run}", STEPS, "parallel.context=2"]])
    same_course(run, plain)


def same_course(run: Path, plain: Path) -> None:
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(run, "gradient_norm") == pytest.approx(losses(plain, "gradient_norm"), rel=1e-4)
    assert losses(run, "validation_loss") == pytest.approx(losses(plain, "validation_loss"), rel=1e-5)
    assert losses(run, "tokens") == losses(plain, "tokens")
    assert losses(run, "fill") == pytest.approx(losses(plain, "fill"))
    assert seen(run) == seen(plain)


def test_what_does_not_divide_is_refused(recipe: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"must divide the 1 processes and the 128 tokens of packing.capacity; these do: 1"
    ):
        train_here(recipe, "parallel.context=2")
