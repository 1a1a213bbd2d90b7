"""`mm estimate` against what training really holds, on the small world's model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm.configure import RecipeError, derive
from mm.model.decoder import Decoder
from mm.model.hub import save_decoder
from mm.model.multimodal import DecoderOptions, ModelOptions, build_model
from mm.train.estimate import CONTEXT, GPUS, Estimate, gpu_named, largest_micro_batch, ways_out
from mm.train.footprint import Footprint, footprint, full_batch, head_beyond_cpu
from mm.train.recipe import Recipe
from tests.small_world import DECODER, environment

PICTURES = (
    *(f"packing.limits.{modality}={limit}" for modality, limit in (("image", 3), ("speech", 0), ("point", 0))),
    *(f"data.sources.{source}=null" for source in ("speech", "points", "chats")),
)
"""Pictures, pages and text, at most three pictures a pack: packs that are nearly full of both."""

MUON = (
    *("precision=bf16", "optim.kind=muon", "optim.average={}"),
    "optim.parts=[{match: '^encoders.image', freeze: true}]",
)

BASIS = (*PICTURES, "parallel.reshard_after_forward=always")
"""No weights stay gathered after the forward, so that what it leaves behind is what it keeps for the backward."""

CASES: dict[tuple[int, str], tuple[str, ...]] = {
    (1, "adamw"): ("precision=fp32",),
    (1, "blocks keep products"): ("precision=fp32", "parallel.activations=selective"),
    (1, "blocks keep their input"): ("precision=fp32", "parallel.activations=full"),
    (1, "muon, averaged, partly frozen"): MUON,
    (2, "adamw"): ("precision=fp32",),
    (2, "two whole models"): ("precision=fp32", "parallel.replicate=2", "parallel.activations=full"),
    (2, "muon, averaged, partly frozen"): MUON,
}
"""Changes to the recipe, by number of processes and name."""

KEPT = [case for case, changes in CASES.items() if changes is not MUON and case != (2, "adamw")]
"""In float32 norms keep on CPUs what they keep on GPUs. Gloo frees what it gathers in threads that no profiler sees."""

MEASURE = """
import gc, json, sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from mm.model.multimodal import build_model
from mm.packing.materialise import MicroStep
from mm.train.optim import build_optimizer, freeze, materialise_state
from mm.train.parallel import join_world, parallelise, resolve_precision
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.small_world import bytes_kept


def nbytes(tensors):
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values())


def measure(recipe, world):
    dataset = planned(recipe).materialiser()
    dtype = resolve_precision(recipe.precision, world.device)
    model = build_model(recipe.model).train()
    freeze(model, recipe.optim)
    parallelise(model, world, dtype, recipe.parallel)
    optimizer = build_optimizer(model, recipe.optim, dtype)
    materialise_state(optimizer, recipe.optim)
    packs = [dataset[MicroStep(0, (number,))] for number in range(8)]
    batch = max(packs, key=lambda pack: (sum(len(media.grids) for media in pack.media.values()), len(pack.tokens)))
    with torch.no_grad():
        model(batch)  # fills the caches of constants, such as the mel filters, which no step keeps anew
    loss, kept = bytes_kept(lambda: model(batch).total)
    loss.backward()
    return {
        "parameters": nbytes(model.parameters()),
        "gradients": nbytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer state": nbytes(
            value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ),
        "kept": kept,
        "tokens": len(batch.tokens),
        "items": sum(len(media.grids) for media in batch.media.values()),
    }


def main(path, out, cases):
    found = {}
    with join_world() as world:
        for name, changes in json.loads(cases).items():
            found[name] = measure(Recipe.load(path, changes), world)
            gc.collect()
        if world.is_first:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


Case = tuple[int, str]


@pytest.fixture(scope="module")
def real(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, int]]:
    """What the first of some real processes holds after a micro-step on the fullest of the first packs."""
    folder = tmp_path_factory.mktemp("measured")
    script = folder / "measure.py"
    script.write_text(MEASURE)
    found = {}
    for processes in (1, 2):
        out = folder / f"{processes}.json"
        changes = {name: [*BASIS, *chosen] for (count, name), chosen in CASES.items() if count == processes}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, str(script), str(recipe), str(out), json.dumps(changes)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        found |= {(processes, name): figures for name, figures in json.loads(out.read_text()).items()}
    return found


@pytest.fixture(scope="module")
def estimated(recipe: Path) -> dict[Case, Footprint]:
    return {
        (processes, name): footprint(Recipe.load(recipe, [*BASIS, *changes]), processes)
        for (processes, name), changes in CASES.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_gradients_and_optimizer_state_are_those_of_training_to_the_byte(
    real: dict[Case, dict[str, int]], estimated: dict[Case, Footprint], case: Case
) -> None:
    for part in ("parameters", "gradients", "optimizer state"):
        assert estimated[case].parts[part] == real[case][part], part


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_what_the_forward_keeps_for_the_backward_is_within_a_tenth_of_training(
    real: dict[Case, dict[str, int]], estimated: dict[Case, Footprint], case: Case
) -> None:
    assert real[case]["items"] == 3
    assert real[case]["tokens"] > 120
    assert sum(estimated[case].kept.values()) == pytest.approx(real[case]["kept"], rel=0.1)


def test_in_16_bits_the_decoder_keeps_half_of_what_it_keeps_in_32(recipe: Path) -> None:
    """As on a GPU, whose norms keep their input. Torch's for CPUs keep it twice in float32."""
    wide, narrow = (footprint(Recipe.load(recipe, [*BASIS, f"precision={p}"]), 1) for p in ("fp32", "bf16"))
    assert narrow.kept["decoder"] == pytest.approx(wide.kept["decoder"] / 2, rel=0.05)


def test_offloaded_weights_gradients_and_optimizer_state_are_in_the_hosts_memory(recipe: Path) -> None:
    chosen = Recipe.load(recipe, [*BASIS, "precision=bf16"])
    here, there = (footprint(derive(chosen, {"parallel": {"offload": offload}}), 2).parts for offload in (False, True))
    for name in ("parameters", "gradients", "optimizer state"):
        assert here[name] > 0
        assert there[name] == 0
    assert there["gathered weights"] == here["gathered weights"]


def test_attention_that_only_gpus_compute_is_estimated_all_the_same(recipe: Path) -> None:
    chosen = [footprint(Recipe.load(recipe, [*BASIS, *change]), 1) for change in ([], ["model.decoder.attention=flex"])]
    assert chosen[0] == chosen[1]


def test_copies_of_the_model_that_the_gpus_do_not_divide_into_are_named(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.replicate is 3, and 4 processes do not divide"):
        footprint(Recipe.load(recipe, ["parallel.replicate=3"]), 4)


def test_a_full_pack_holds_the_limits_items_and_its_capacity_of_tokens(recipe: Path) -> None:
    chosen = Recipe.load(recipe, PICTURES)
    batch = full_batch(build_model(chosen.model, meta=True), chosen.packing, packs=2)
    assert [len(media.grids) for media in batch.media.values()] == [6]
    assert len(batch.tokens) == 2 * chosen.packing.capacity == int(batch.packs[-1])


def test_the_largest_micro_batch_fits_and_the_next_does_not(recipe: Path) -> None:
    chosen = Recipe.load(recipe, [*PICTURES, "precision=bf16", "packing.batch=8"])  # 1, 2, 4 or 8 packs at once
    tried = [Estimate.of(derive(chosen, {"micro_batch": packs}), 1, GPUS["h100"]) for packs in (1, 2, 4)]
    assert tried[0].total < tried[1].total < tried[2].total
    for begin in (tried[0], tried[2]):
        largest = largest_micro_batch(replace(begin, gpu=replace(GPUS["h100"], memory=tried[1].total)))
        assert largest is not None
        assert largest.recipe.micro_batch == 2
    assert largest_micro_batch(replace(tried[0], gpu=replace(GPUS["h100"], memory=CONTEXT))) is None


def test_what_to_change_offers_what_keeps_less_than_the_recipe_does(recipe: Path) -> None:
    def offered(*changes: str) -> set[str]:
        return {words for words, _, _ in ways_out(Recipe.load(recipe, changes), 2) if words.startswith("parallel.")}

    offload = "parallel.offload=true"
    assert offered() == {"parallel.activations=selective", "parallel.activations=full", offload}
    assert offered("parallel.activations=selective", offload) == {"parallel.activations=full"}
    spread = ("parallel.replicate=2", "parallel.reshard_after_forward=never", "parallel.activations=full")
    assert offered(*spread) == {"parallel.replicate=1", "parallel.reshard_after_forward=default", offload}


def test_muon_saves_the_second_moment_of_the_matrices_in_blocks(recipe: Path) -> None:
    chosen = Recipe.load(recipe, [*PICTURES, "precision=bf16"])
    model = build_model(chosen.model, meta=True)
    towers = [model.decoder, *model.encoders.values()]
    matrices = [p for tower in towers for block in tower.blocks() for p in block.parameters() if p.ndim == 2]
    changes = {words: changes for words, changes, _ in ways_out(chosen, 1)}["optim.kind=muon"]
    before, after = (footprint(other, 1).parts["optimizer state"] for other in (chosen, derive(chosen, changes)))
    steps = 4 * len(matrices)  # AdamW also counts the steps of each
    assert before - after == 4 * sum(matrix.numel() for matrix in matrices) + steps


def test_the_flops_of_a_step_are_three_forwards_of_what_trains(recipe: Path) -> None:
    chosen = Recipe.load(recipe, [*PICTURES, "packing.limits.image=0", "precision=bf16"])
    decoder = build_model(chosen.model, meta=True).decoder
    capacity, packs = chosen.packing.capacity, chosen.packing.packs_per_batch
    forward = decoder.flops([capacity] * packs) + decoder.head_flops(capacity * packs)
    assert Estimate.of(chosen, 2, GPUS["h100"]).step_flops == pytest.approx(3 * forward)


def test_experts_are_counted_and_depth_routing_is_refused_with_the_reason(recipe: Path) -> None:
    groups = "model.decoder.config.experts={groups: {text: 4, image: 1, speech: 1, point: 1}}"
    dense, experts = (footprint(Recipe.load(recipe, options), 1) for options in ([], [groups]))
    added = 2 * (6 * 3 * 32 * 64 + 4 * 32)  # in two layers six feed-forwards more, and a router for four experts
    assert experts.parts["parameters"] - dense.parts["parameters"] == 4 * added
    with pytest.raises(RecipeError, match=r"Leave model\.decoder\.config\.depth out"):
        footprint(Recipe.load(recipe, ["model.decoder.config.depth={capacity: 0.5}"]), 1)


def test_an_unknown_gpu_and_a_batch_that_does_not_divide_are_named(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="'v100' is not known; known are rtx-4090, a100-40g"):
        gpu_named("v100")
    with pytest.raises(RecipeError, match="4 packs does not divide among 3 processes"):
        Estimate.of(Recipe.load(recipe), 3, GPUS["h100"])


def test_sizes_beside_a_checkpoint_are_planned_by_and_must_be_its_own(tmp_path: Path) -> None:
    config = DecoderOptions(config=DECODER).resolve()
    save_decoder(Decoder(config), tmp_path)
    nowhere = ModelOptions(DecoderOptions("no/such-checkpoint", DECODER))
    assert build_model(nowhere, meta=True).decoder.config == config
    assert build_model(ModelOptions(DecoderOptions(str(tmp_path), DECODER | {"context": 2048})))
    with pytest.raises(RecipeError, match=r"config.layers is 3 and .* has 2; correct the recipe"):
        build_model(ModelOptions(DecoderOptions(str(tmp_path), DECODER | {"layers": 3})))


@pytest.mark.parametrize("name", ["open-qwen2vl-pretrain", "open-qwen2vl-sft", "qwen2.5-7b-siglip", "smolvlm-256m"])
def test_recipes_for_gpus_load_and_build_their_model_without_the_hub(name: str) -> None:
    chosen = Recipe.load(f"train/{name}.yaml")
    model = build_model(chosen.model, meta=True)
    parameters = sum(parameter.numel() for parameter in model.decoder.parameters())
    # model cards: Qwen2.5 has 1.54B and 7.61B parameters, SmolLM2 135M
    expected = {"open": 1.54e9, "qwen": 7.61e9, "smol": 135e6}[name[:4]]
    assert parameters == pytest.approx(expected, rel=0.01)
    assert all(source.card.startswith("cards/YOUR-") for source in chosen.data.sources.values())


@pytest.mark.parametrize(
    ("labels", "width", "dtype", "expected"),
    [
        (2000, 64, torch.float32, 4 * 1000 * (512 - 384)),
        (2000, 2048, torch.float32, 4 * 1000 * (1024 - 384)),
        (400, 64, torch.float32, 4 * 1000 * (400 - 384)),
        (100, 64, torch.float32, 0),
        (2000, 64, torch.bfloat16, 4 * 1000 * (512 - 384 - 64)),
        (2000, 2048, torch.bfloat16, 0),
    ],
)
def test_the_head_on_a_gpu_has_larger_chunks_and_no_wider_weight(labels, width, dtype, expected) -> None:
    assert head_beyond_cpu(labels, 1000, width, dtype) == expected
