"""Decoders with experts and depth routing under the loop: sharded, accumulated, compiled, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch._dynamo import config as dynamo_config

from tests.small_world import losses, train_here, train_together

pytestmark = pytest.mark.timeout(900)

EXPERTS = {"groups": {"text": 2, "image": 2, "speech": 1, "point": 2}, "noise": True}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {"experts": EXPERTS, "dropout": 0.1},
    "experts and depth": {"experts": EXPERTS, "depth": {"capacity": 0.5}, "norm": "post"},
    "token choice": {"experts": {"groups": {"all": 4}, "router": "token_choice", "top": 2}},
    "untied": {"experts": EXPERTS, "untied": ["attention", "norms"], "qk_norm": "layer"},
}
STEPS = "steps=4"


@pytest.fixture(scope="module")
def recipes(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small world's recipe with each of the decoders."""
    written = {}
    for name, changes in KINDS.items():
        folder = tmp_path_factory.mktemp("recipe")
        plain = yaml.safe_load(recipe.read_text())
        plain["model"]["decoder"]["config"] |= changes
        written[name] = folder / "recipe.yaml"
        written[name].write_text(yaml.safe_dump(plain, sort_keys=False))
    return written


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: train_here(one, f"run={tmp_path_factory.mktemp('alone')}", STEPS) for name, one in recipes.items()}


@pytest.fixture(scope="module")
def on_two(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_on(2, recipes, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_on(4, recipes, tmp_path_factory.mktemp("four"))


def run_on(processes: int, recipes: dict[str, Path], folder: Path) -> dict[str, Path]:
    runs = {name: folder / name.replace(" ", "-") for name in recipes}
    options = ("parallel.activations=full",)  # what is drawn is drawn again
    train_together(folder, processes, [[str(recipes[name]), f"run={runs[name]}", STEPS, *options] for name in recipes])
    return runs


def same_course(run: Path, other: Path) -> None:
    chosen = "tokens_without_expert"  # numbers are compared only where experts choose alike
    assert losses(run, chosen) == losses(other, chosen)
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    assert losses(run, "gradient_norm") == pytest.approx(losses(other, "gradient_norm"), rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_as_one(alone: dict[str, Path], on_two: dict[str, Path], name: str) -> None:
    same_course(on_two[name], alone[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_four_processes_train_as_one(alone: dict[str, Path], on_four: dict[str, Path], name: str) -> None:
    same_course(on_four[name], alone[name])


@pytest.mark.slow
def test_deepspeed_trains_experts_as_fsdp2_does(
    recipes: dict[str, Path], on_two: dict[str, Path], tmp_path: Path
) -> None:
    """Experts read weights of modules that they do not call, which stage 3 has to gather all the same."""
    runs = {(name, stage): tmp_path / f"{name}-{stage}" for name in KINDS for stage in (1, 3)}
    deepspeed = "parallel.engine=deepspeed"
    jobs = [
        [str(recipes[name]), f"run={run}", STEPS, deepspeed, f"parallel.zero={stage}"]
        for (name, stage), run in runs.items()
    ]
    train_together(tmp_path, 2, jobs)
    for (name, _), run in runs.items():
        same_course(run, on_two[name])


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_of_any_size_train_alike(
    recipes: dict[str, Path], alone: dict[str, Path], tmp_path: Path, name: str
) -> None:
    same_course(train_here(recipes[name], f"run={tmp_path}", STEPS, "micro_batch=4"), alone[name])


def test_a_resumed_run_draws_the_same_noise(recipes: dict[str, Path], alone: dict[str, Path], tmp_path: Path) -> None:
    one = recipes["experts"]
    train_here(one, f"run={tmp_path}", "steps=2")
    resumed = losses(train_here(one, f"run={tmp_path}", STEPS))
    assert resumed == losses(alone["experts"])


@pytest.mark.slow
def test_compiled_blocks_with_experts_need_few_compilations(
    recipes: dict[str, Path], alone: dict[str, Path], tmp_path: Path
) -> None:
    """Experts take another number of tokens in every batch: that number is a variable of the compiled code."""
    one = recipes["untied"]
    eager = losses(train_here(one, f"run={tmp_path / 'eager'}", "steps=8", "micro_batch=1"))
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):  # a limit that `compile_blocks` raises
        compiled = losses(
            train_here(one, f"run={tmp_path / 'compiled'}", "steps=8", "micro_batch=1", "parallel.compile=true")
        )
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_context_parallelism_is_refused_with_the_reason(recipes: dict[str, Path], tmp_path: Path) -> None:
    job = [str(recipes["experts"]), f"run={tmp_path}", STEPS, "parallel.context=2"]
    with pytest.raises(AssertionError, match="need all tokens of a pack on one device"):
        train_together(tmp_path, 2, [job])
