"""Runs from recipe to loss: the same batches on any number of processes, broken data, precision, freezing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import load as load_checkpoint

from mm.configure import RecipeError
from mm.data.shards import ShardChanged
from mm.layers.layout import Share
from mm.packing.batch import Batch
from mm.packing.collate import LengthMismatch
from mm.packing.materialise import MicroStep
from mm.packing.plan import PlanChanged
from mm.sample import Modality
from mm.train import checkpoint
from mm.train.checkpoint import Position
from mm.train.dataset import PlannedData, open_data
from mm.train.loop import RunError, load_batches
from mm.train.parallel import ParallelOptions, World, join_world, parallelise, resolve_precision
from mm.train.reading import Reader
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from tests.conftest import Runs
from tests.small_world import DECODER, ENCODERS, losses, tiny_model, train_here, write_recipe, write_source

pytestmark = pytest.mark.timeout(900)  # the runs that the tests share take longest, and the first test waits for them

CPU = torch.device("cpu")


def planned(recipe: Recipe, folder: Path) -> PlannedData:
    data = open_data(recipe, Blueprint.of(recipe), recipe.data.sources, folder, epochs=recipe.epochs)
    data.plan.ensure((recipe.steps or 1) * recipe.packing.packs_per_batch)
    return data


@pytest.fixture(scope="module")
def data(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedData:
    """20 steps of the recipe over all sources."""
    return planned(Recipe.load(recipe, ["steps=20"]), tmp_path_factory.mktemp("plan"))


# ------------------------------------------------------------------------- 3. the same batches, whoever works on them


def rows_of_steps(data: PlannedData, world: int, micro_batch: int) -> list[list[tuple[int, int]]]:
    """(source, row) of all samples of each step, over all ranks, sorted."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(20)]
    for rank in range(world):
        steps = data.micro_steps(Share(rank, world), micro_batch, seed=3, steps=range(20), first_pack=0)
        for micro_step in steps:
            for pack in map(data.plan.pack, micro_step.packs):
                found[micro_step.step] += zip(pack.source.tolist(), pack.row.tolist(), strict=True)
    return [sorted(rows) for rows in found]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_global_batch_holds_the_same_samples_for_any_world(data: PlannedData, world: int, micro_batch: int) -> None:
    assert rows_of_steps(data, world, micro_batch) == rows_of_steps(data, 1, 1)


def test_global_batches_differ(data: PlannedData) -> None:
    steps = rows_of_steps(data, 1, 1)
    assert len({tuple(rows) for rows in steps}) == len(steps)


def same_batch(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.tokens, other.tokens)
        and torch.equal(one.rows, other.rows)
        and one.media.keys() == other.media.keys()
        and all(
            torch.equal(tensor, other.media[modality].inputs[name])
            for modality, media in one.media.items()
            for name, tensor in media.inputs.items()
        )
    )


def test_workers_change_nothing_in_the_batches(recipe: Path, data: PlannedData) -> None:
    start = Position(0, 0, 0, data.plan.fingerprint)
    made = [
        list(load_batches(Recipe.load(recipe, [f"data.workers={n}"]), World(0, 1, CPU), data, start, total=4))
        for n in (0, 2)
    ]
    assert len(made[0]) == 16
    assert all(same_batch(one, other) for one, other in zip(*made, strict=True))
    assert not same_batch(made[0][0], made[0][1])


def test_losses_of_two_processes_are_those_of_one_over_200_steps(runs: Runs) -> None:
    one, two = losses(runs.one), losses(runs.two)
    assert list(one) == list(two) == list(range(1, 201))
    assert one[200] < 0.5 * one[1]  # something was learnt
    assert max(abs(two[step] / one[step] - 1) for step in one) < 1e-3


@pytest.mark.parametrize("figure", ["loss", "gradient_norm", "tokens", "fill", "loss/source/speech", "validation_loss"])
def test_what_two_processes_report_is_what_one_reports(runs: Runs, figure: str) -> None:
    assert losses(runs.whole, figure)
    assert losses(runs.shared, figure) == pytest.approx(losses(runs.whole, figure), rel=1e-4)


# --------------------------------------------------------------------------------- 5. ranks without some modality


def test_the_200_steps_had_ranks_with_other_modalities_than_their_neighbours(data: PlannedData) -> None:
    """What makes the comparison of losses above a proof for missing modalities."""
    dataset = data.materialiser()
    data.plan.packs_per_batch = 2
    ranks = [data.micro_steps(Share(rank, 2), 1, seed=3, steps=range(40), first_pack=0) for rank in (0, 1)]
    meetings = [tuple(frozenset(dataset[one].media) for one in steps) for steps in zip(*ranks, strict=True)]
    for modality in (Modality.IMAGE, Modality.SPEECH, Modality.POINT):
        held = {(modality in first, modality in second) for first, second in meetings}
        if modality is not Modality.IMAGE:
            assert (False, False) in held, modality
        assert held & {(True, False), (False, True)}, modality


@pytest.mark.parametrize("sources", [["text"], ["text", "speech"]])
def test_runs_without_some_modalities_lower_their_loss(
    corpus: dict[str, Path], tokenizer_folder: Path, tmp_path: Path, sources: list[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, tokenizer_folder, sources=sources)
    loss = losses(train_here(recipe, "steps=6"))
    assert loss[6] < loss[1]


# ------------------------------------------------------------------------------------------------------ validation


def test_the_validation_loss_is_the_mean_over_held_out_labels(runs: Runs, corpus: dict[str, Path]) -> None:
    recipe = Recipe.load(runs.recipe)
    reported = losses(runs.one, "validation_loss")
    assert list(reported) == [100, 200]
    assert losses(runs.two, "validation_loss") == pytest.approx(reported, rel=1e-3)

    model = tiny_model()
    checkpoint.load_weights(checkpoint.find(runs.one), model)
    held_out = open_data(recipe, Blueprint.of(recipe), recipe.data.validation, runs.one / "validation", epochs=1.0)
    index, processor = held_out.sources[0].index, held_out.blueprint.processor
    assert index is not None
    total = weight = 0.0
    with torch.no_grad():
        for row in range(index.rows):
            document = processor.document(index.sample(row, 0))
            batch = processor.collate([[document]], [[(0, 0, row)]])
            total, weight = total + float(model.eval()(batch).total), weight + float(batch.weights.sum())
    assert reported[200] == pytest.approx(total / weight, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- precision


def test_bf16_on_one_and_two_processes_stays_close_to_fp32(runs: Runs, tmp_path: Path) -> None:
    exact = losses(runs.whole)
    for rounded in (losses(train_here(runs.recipe, f"run={tmp_path}", "steps=8", "precision=bf16")), losses(runs.bf16)):
        assert rounded == pytest.approx(exact, rel=5e-3)
        assert rounded != exact


def test_sharding_copies_no_layout_and_rounds_no_loss_weight(data: PlannedData) -> None:
    """FSDP2 by default casts and copies whatever enters a block: masks would be derived anew in every layer."""
    model = tiny_model()
    batch = data.materialiser()[MicroStep(0, (0,))]
    batch = replace(batch, weights=batch.weights * 1.001)
    with join_world() as world:
        parallelise(model, world, torch.bfloat16, ParallelOptions())
        layouts, weights = [], []
        for block in model.decoder.blocks():
            block.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[1].layout))
        model.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[0].weights))
        model(batch)
    assert len(layouts) == 2
    assert layouts[0] is layouts[1]
    assert torch.equal(weights[0], batch.weights)


@pytest.mark.slow
def test_a_network_with_batch_norm_trains_in_bf16(recipe: Path, tmp_path: Path) -> None:
    image = "model.encoders.image"
    network = [f"{image}.name=test_efficientnet", f"{image}.image_size=64", f"{image}.layer=null", "steps=3"]
    exact = losses(train_here(recipe, f"run={tmp_path / 'exact'}", *network))
    rounded = losses(train_here(recipe, f"run={tmp_path / 'rounded'}", *network, "precision=bf16"))
    assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=2e-2)


def test_auto_precision_is_what_the_processor_multiplies_natively(runs: Runs, tmp_path: Path) -> None:
    dtype = resolve_precision("auto", CPU)
    assert dtype == (torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32)
    run = train_here(runs.recipe, f"run={tmp_path}", "steps=2", "precision=auto")
    exact = losses(runs.whole)
    assert losses(run) == pytest.approx({1: exact[1], 2: exact[2]}, rel=5e-3 if dtype is torch.bfloat16 else 0)


# --------------------------------------------------------------------------------------------- freezing, init_from


def test_a_deterministic_run_is_the_same_run_on_a_cpu(runs: Runs, tmp_path: Path) -> None:
    run = train_here(runs.recipe, f"run={tmp_path}", "steps=8", "deterministic=true")
    assert losses(run) == losses(runs.whole)
    assert not torch.are_deterministic_algorithms_enabled()


def test_frozen_parameters_keep_every_bit_and_all_others_move(recipe: Path, tmp_path: Path) -> None:
    before = tmp_path / "before"
    train_here(recipe, f"run={before}", "steps=1", "optim.lr=0.0")
    parts = "optim.parts=[{match: '^encoders', freeze: true}, {match: '^decoder', freeze: true}]"
    after = train_here(recipe, f"run={tmp_path / 'after'}", "steps=6", f"init_from={before}", parts)
    first, last = tiny_model(), tiny_model()
    checkpoint.load_weights(checkpoint.find(before), first)
    checkpoint.load_weights(checkpoint.find(after), last)
    moved = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, last.state_dict()[name])}
    assert moved == {name for name, _ in last.named_parameters() if name.startswith("adapters")}


def test_init_from_takes_weights_and_nothing_else(runs: Runs, tmp_path: Path) -> None:
    run = train_here(runs.recipe, f"run={tmp_path}", "steps=1", "optim.lr=0.0", f"init_from={runs.one}")
    ours, theirs = tiny_model(), tiny_model()
    checkpoint.load_weights(checkpoint.find(run), ours)
    checkpoint.load_weights(checkpoint.find(runs.one), theirs)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    position = checkpoint.read_position(checkpoint.find(run))
    assert (position.step, position.packs) == (1, 4)
    assert losses(run)[1] < 0.5 * losses(runs.one)[1]
    state: dict = {"optimizer": {"state.decoder.norm.weight.step": torch.zeros(())}}
    load_checkpoint(state, storage_reader=Reader(checkpoint.find(run)))
    assert float(state["optimizer"]["state.decoder.norm.weight.step"]) == 1


# -------------------------------------------------------------------------------------------------------- broken data


BROKEN = [3, 17]


@pytest.fixture(scope="module")
def half_broken(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path
) -> tuple[Path, PlannedData]:
    """A recipe of one epoch over pictures of which two have no end, and its plan."""
    folder = tmp_path_factory.mktemp("broken")
    cards = corpus | {"pairs": write_source(folder, "pairs", rows=24, broken=BROKEN)}
    recipe = write_recipe(folder, cards, tokenizer_folder, sources=["pairs"], steps=None, epochs=1.0)
    return recipe, planned(Recipe.load(recipe), folder / "plan")


def test_a_broken_picture_becomes_padding_without_loss(half_broken: tuple[Path, PlannedData]) -> None:
    _, data = half_broken
    dataset, processor = data.materialiser(), data.blueprint.processor
    model = tiny_model().double()
    seen = []
    for number in range(data.plan.total_packs() or 0):
        batch = dataset[MicroStep(0, (number,))]
        pack = data.plan.pack(number)
        assert batch.offsets.diff().tolist() == pack.length.tolist()
        sound = [one for one in pack.samples() if 12 * one.shard + one.row not in BROKEN]
        documents = [processor.document(data.samples[0].sample(one.shard, one.row)) for one in sound]
        without = processor.collate([documents], [[one[:3] for one in sound]])
        with torch.no_grad():
            assert float(model(batch).total) == pytest.approx(float(model(without).total), rel=1e-10)
        seen += batch.broken
    assert sorted(name for name, _ in seen) == [
        "pairs, pairs-0.tar, row 3 (000003)",
        "pairs, pairs-1.tar, row 5 (000017)",
    ]


def test_a_run_goes_on_over_broken_pictures_and_lists_them(half_broken: tuple[Path, PlannedData]) -> None:
    run = train_here(half_broken[0], "data.max_broken=0.1")
    events = [json.loads(line)["event"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len(events) == 2
    assert {event.split(":")[0] for event in events} == {
        "pairs, pairs-0.tar, row 3 (000003)",
        "pairs, pairs-1.tar, row 5 (000017)",
    }
    assert all(math.isfinite(loss) for loss in losses(run).values())


def test_too_many_broken_pictures_stop_the_run_with_their_names(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    cards = corpus | {"pairs": write_source(tmp_path, "pairs", rows=24, broken=range(0, 24, 2))}
    recipe = write_recipe(tmp_path, cards, tokenizer_folder, sources=["pairs"])
    names = r"\n  pairs, pairs-\d\.tar, row \d+ \(0000"
    with pytest.raises(RunError, match=r"data\.max_broken allows 0\.01 of .*ledger\.jsonl.*" + names):
        train_here(recipe)


def test_a_shard_that_changed_after_planning_is_noticed(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    card = write_source(tmp_path, "pairs", rows=24)
    recipe = write_recipe(tmp_path, corpus | {"pairs": card}, tokenizer_folder, sources=["pairs"])
    dataset = planned(Recipe.load(recipe), tmp_path / "plan").materialiser()
    write_source(tmp_path, "pairs", rows=24, broken=range(24))
    with pytest.raises(ShardChanged, match="pairs-"):
        [dataset[MicroStep(0, (pack,))] for pack in range(3)]


def test_a_resumed_run_refuses_data_that_changed(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    card = write_source(tmp_path, "text", rows=24)
    recipe = write_recipe(tmp_path, corpus | {"text": card}, tokenizer_folder, sources=["text"])
    train_here(recipe, "steps=1")
    write_source(tmp_path, "text", rows=22)
    with pytest.raises(PlanChanged, match=r"text\.fingerprint"):
        train_here(recipe, "steps=2")


@pytest.mark.parametrize("size", [16, 64])
def test_an_encoder_that_gives_another_length_than_planned_is_an_error_with_the_samples_name(
    recipe: Path, data: PlannedData, size: int
) -> None:
    other = Blueprint.of(Recipe.load(recipe, [f"model.encoders.image.image_size={size}"]))
    dataset = replace(data, blueprint=other).materialiser()
    name = r"^(pairs|pages|chats), \1-\d\.tar, row \d+ \(\d+\)"
    with pytest.raises(LengthMismatch, match=name + r": the plan promised \d+ tokens, "):
        [dataset[MicroStep(0, (pack,))] for pack in range(20)]


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("processes", "micro_batch", "fitting"), [(3, 1, "1, 2, 4"), (8, 1, "1, 2, 4"), (4, 2, "1, 2"), (1, 3, "none")]
)
def test_processes_that_do_not_divide_the_batch_are_refused_with_those_that_do(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int, micro_batch: int, fitting: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(
        ValueError, match=f"4 packs does not divide among {processes} processes.* it does among {fitting}"
    ):
        train_here(recipe, f"run={tmp_path}", f"micro_batch={micro_batch}")


def test_data_of_a_modality_without_an_encoder_is_refused(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    model = {"decoder": {"config": DECODER}, "encoders": {"image": ENCODERS["image"]}}
    without = write_recipe(tmp_path, corpus, tokenizer_folder, model=model)
    with pytest.raises(RecipeError, match=r"add model\.encoders\.speech"):
        train_here(without)


def test_more_steps_than_the_data_holds_are_refused(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    recipe = write_recipe(tmp_path, corpus, tokenizer_folder, sources=["text"])
    with pytest.raises(RunError, match=r"asks for 50 steps.* enough for \d"):
        train_here(recipe, "steps=50", "data.sources.text.epochs=2")


def test_a_resumed_run_may_change_the_size_of_its_batches(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    recipe = write_recipe(tmp_path, corpus, tokenizer_folder, sources=["text"])
    train_here(recipe, "steps=4", "packing.window=2")
    run = train_here(recipe, "steps=8", "packing.window=2", "packing.batch=2")
    position = checkpoint.read_position(checkpoint.find(run))
    assert (position.step, position.packs) == (8, 4 * 4 + 4 * 2)
    assert list(losses(run)) == list(range(1, 9))
