"""Memory by part against sizes that are known, and the peak against an allocation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mm.configure import RecipeError
from mm.train.average import AverageOptions
from mm.train.memory import Memory, check_memory, held_bytes, held_bytes_of, peak_resident
from mm.train.meter import Meter, Peak
from mm.train.optim import Kind, OptimOptions, Part, build_optimizer, freeze, materialise_state
from tests.small_world import environment, losses, tiny_model, train_here, train_together, write_recipe

CPU = torch.device("cpu")


def memory_of(options: OptimOptions) -> tuple[nn.Module, Memory]:
    model = tiny_model(["image"])
    freeze(model, options)
    optimizer = build_optimizer(model, options)
    materialise_state(optimizer, options)
    return model, Memory(CPU, held_bytes(model, optimizer, CPU))


def floats(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def test_parts_are_four_bytes_a_parameter_and_frozen_ones_have_neither_gradient_nor_state():
    model, memory = memory_of(OptimOptions(parts=[Part(r"^encoders\.", freeze=True)]))
    trained = floats(model, trained=True)
    assert 0 < trained < floats(model) / 2
    tensors = sum(p.requires_grad for p in model.parameters())
    assert memory.held["parameters"] == 4 * floats(model)
    assert memory.held["gradients"] == 4 * trained
    assert memory.held["optimizer"] == 8 * trained + 4 * tensors  # two moments, and a count of steps each


def test_gradients_are_as_large_as_a_backward_makes_them():
    model, memory = memory_of(OptimOptions())
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    assert memory.held["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_what_is_on_another_device_is_not_counted():
    model, _ = memory_of(OptimOptions())
    held = held_bytes(model, torch.optim.AdamW(model.parameters()), torch.device("meta"))
    assert set(held.values()) == {0}


def test_the_peak_is_of_this_process_and_stays_when_memory_is_freed():
    """In a process of its own: what this one has needed before would hide it."""
    script = (
        "from mm.train.memory import peak_resident as peak\nbefore = peak(); b'1' * 200_000_000; print(before, peak())"
    )
    ballast = b"1" * 400_000_000  # whose mark the child must not begin with
    assert peak_resident() >= len(ballast)
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    before, after = map(int, output.split())
    assert 190e6 < after - before < 230e6


def test_the_figures_are_of_the_process_with_most_and_add_up_to_the_peak():
    _, memory = memory_of(OptimOptions())
    asked: list[list[float]] = []

    def doubled(numbers: list[float]) -> list[float]:
        asked.append(numbers)
        return [2 * number for number in numbers]

    meter = Meter(("total",), {}, Peak(1e12, "made up", "mfu"), memory=memory, largest=doubled)
    meter.end_step(1.0, 1e-3)
    figures = meter.report()
    assert len(asked) == 1
    assert figures["memory/parameters"] == 2 * memory.held["parameters"]
    parts = [figures[f"memory/{part}"] for part in ("parameters", "gradients", "optimizer", "rest")]
    assert sum(parts) == figures["memory/peak"] >= 2 * 100e6  # torch alone is more


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_of_two_processes_holds_half(corpus: dict[str, Path], tokenizer_folder: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus, tokenizer_folder, ["pairs", "text"], steps=1)
    whole = train_here(recipe, f"run={tmp_path / 'one'}")
    train_together(tmp_path, 2, [[str(recipe), f"run={tmp_path / 'two'}"]])
    for part in ("parameters", "gradients", "optimizer"):
        one, two = (losses(run, f"memory/{part}")[1] for run in (whole, tmp_path / "two"))
        assert 0.5 <= two / one < 0.55, part  # a dimension that two does not divide leaves one more row on the first
    assert json.loads((whole / "metrics.jsonl").read_text())["memory/peak"] > 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("average", [False, True])
def test_what_is_held_is_known_from_shapes_before_anything_is_built(kind: Kind, average: bool) -> None:
    options = OptimOptions(
        kind, average=AverageOptions() if average else None, parts=[Part(r"^encoders\.", freeze=True)]
    )
    model, memory = memory_of(options)
    counters = 4 * sum(parameter.requires_grad for parameter in model.parameters())  # one number a parameter, or less
    shapes = tiny_model(["image"], meta=True)
    freeze(shapes, options)
    assert 0 <= sum(memory.held.values()) - held_bytes_of(shapes, options) <= 2 * counters


def test_a_model_that_cannot_fit_is_told_before_its_weights_are_read() -> None:
    """The model is on the meta device, where weights take no memory."""
    held = held_bytes_of(tiny_model(meta=True), OptimOptions())
    check_memory(tiny_model(meta=True), OptimOptions(), shards=1, available=held)
    check_memory(tiny_model(meta=True), OptimOptions(), shards=4, available=held // 4)
    with pytest.raises(RecipeError, match=r"GiB in each of 2 processes that share them, and there are 0\.0 GiB"):
        check_memory(tiny_model(meta=True), OptimOptions(), shards=2, available=held // 4)


def test_a_run_too_large_for_the_machine_stops_with_a_sentence_before_anything_is_indexed(
    recipe: Path, tmp_path: Path
) -> None:
    config = "{vocabulary: 259, width: 65536, layers: 99, heads: 2, kv_heads: 1, head_dim: 16, ffn: 65536}"
    with pytest.raises(RecipeError, match="without counting a single activation"):
        train_here(
            recipe, f"run={tmp_path / 'run'}", f"data.index={tmp_path / 'index'}", f"model.decoder.config={config}"
        )
    assert not (tmp_path / "index").exists()
