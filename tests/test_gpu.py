"""Training on an NVIDIA GPU against the CPU, which is the reference: `pytest -m gpu` (all other tests hide GPUs)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from mm.cli import app
from mm.evaluate.answerer import Prompt, ScoredQuestion
from mm.evaluate.model import ModelAnswerer
from mm.layers import cross_entropy
from mm.layers.attention import BACKENDS
from mm.layers.cross_entropy import linear_cross_entropy
from mm.layers.layout import Layout
from mm.model.experts import ExpertGroup, Experts
from mm.train.export import load_trained
from tests.conftest import once
from tests.small_world import ONE_AFTER_ANOTHER, environment, losses, picture, train_here
from tests.test_fusion_commands import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu"),
]

EXPERTS = {"groups": {"text": 2, "image": 2, "speech": 1, "point": 2}}
DECODERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": EXPERTS},
    "experts without noise": {"experts": EXPERTS | {"noise": False}},
    "experts and depth": {"experts": EXPERTS, "depth": {"capacity": 0.5}, "norm": "post"},
    "token choice": {"experts": {"groups": {"all": 4}, "router": "token_choice", "top": 2}},
    "untied": {"experts": EXPERTS, "untied": ["attention", "norms"], "qk_norm": "layer"},
    "bidirectional media": {"media_attention": "bidirectional"},
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "activations are recomputed": ("parallel.activations=full",),
    "products are kept": ("parallel.activations=selective",),
    "weights live in the host's memory": ("parallel.offload=true",),
    "Muon": ("optim.kind=muon",),
    "workers load": ("data.workers=2",),
}
"""What must not change the losses, but for Muon, which is compared with itself."""

decoders = pytest.mark.parametrize("name", DECODERS)
STEPS = "steps=6"


@pytest.fixture(scope="session")
def recipes(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small world's recipe with each of the decoders."""
    written = {}
    for name, changes in DECODERS.items():
        plain = yaml.safe_load(recipe.read_text())
        plain["model"]["decoder"]["config"] |= changes
        written[name] = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        written[name].write_text(yaml.safe_dump(plain, sort_keys=False))
    return written


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In convolutions too, which torch computes in TF32 where nothing else is said."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def on_cpu(recipes: dict[str, Path], session_folder: Path) -> dict[str, Path]:
    """Runs of the same recipes, and of one with Muon, in a process that sees no GPU."""
    folder = once(session_folder / "on-cpu", lambda folder: train_on_cpu(recipes, folder))
    return {name: folder / name.replace(" ", "-") for name in (*DECODERS, "Muon")}


def train_on_cpu(recipes: dict[str, Path], folder: Path) -> None:
    runs = {name: folder / name.replace(" ", "-") for name in (*DECODERS, "Muon")}
    jobs = [
        (29500, str(recipes.get(name, recipes["dense"])), f"run={run}", STEPS, *OPTIONS.get(name, ()))
        for name, run in runs.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(jobs)],
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


# ---------------------------------------------------------------------------------------------------------------- runs


@decoders
def test_float32_trains_as_on_the_cpu(
    recipes: dict[str, Path], on_cpu: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run = train_here(recipes[name], f"run={tmp_path}", STEPS)
    assert losses(run) == pytest.approx(losses(on_cpu[name]), rel=1e-4)
    assert losses(run, "gradient_norm") == pytest.approx(losses(on_cpu[name], "gradient_norm"), rel=1e-2)


@decoders
def test_bf16_trains_nearly_as_float32(
    recipes: dict[str, Path], on_cpu: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run = train_here(recipes[name], f"run={tmp_path}", STEPS, "precision=bf16")
    assert losses(run) == pytest.approx(losses(on_cpu[name]), rel=0.02)


@pytest.mark.parametrize("name", ["dense", "experts", "untied", "bidirectional media"])
def test_compiled_blocks_train_as_eager_ones(
    recipes: dict[str, Path], on_cpu: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run = train_here(recipes[name], f"run={tmp_path}", STEPS, "parallel.compile=true")
    assert losses(run) == pytest.approx(losses(on_cpu[name]), rel=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_as_on_the_cpu(recipe: Path, on_cpu: dict[str, Path], tmp_path: Path, name: str) -> None:
    run = train_here(recipe, f"run={tmp_path}", STEPS, *OPTIONS[name])
    expected = on_cpu["Muon" if name == "Muon" else "dense"]
    assert losses(run) == pytest.approx(losses(expected), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(recipe: Path, tmp_path: Path, precision: str) -> None:
    chosen = f"precision={precision}"
    whole = losses(train_here(recipe, f"run={tmp_path / 'whole'}", STEPS, chosen))
    train_here(recipe, f"run={tmp_path / 'parts'}", "steps=3", chosen)
    assert losses(train_here(recipe, f"run={tmp_path / 'parts'}", STEPS, chosen)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["dense", "experts", "experts and depth", "token choice", "untied"])
def test_a_deterministic_run_that_goes_on_has_the_bits_of_the_run_that_did_not_stop(
    recipes: dict[str, Path], tmp_path: Path, name: str
) -> None:
    chosen = ("precision=bf16", "deterministic=true")
    whole = losses(train_here(recipes[name], f"run={tmp_path / 'whole'}", STEPS, *chosen))
    train_here(recipes[name], f"run={tmp_path / 'parts'}", "steps=3", *chosen)
    assert losses(train_here(recipes[name], f"run={tmp_path / 'parts'}", STEPS, *chosen)) == whole


def test_the_loss_by_a_kernel_trains_as_the_reference(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    options = ("precision=bf16", STEPS)
    plain = train_here(recipe, f"run={tmp_path / 'plain'}", *options)
    liger = train_here(
        recipe,
        f"run={tmp_path / 'liger'}",
        *options,
        "objective._target_=mm.objectives.next_token.NextToken",
        "objective.backend=liger",
    )
    assert losses(liger) == pytest.approx(losses(plain), rel=0.01)


def test_a_profile_tells_what_the_gpu_did(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm", "train", str(recipe), f"run={tmp_path}", "--profile", "2-3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "in 2 steps" in done.stdout
    assert "by its own time on the GPU" in done.stdout
    text = (tmp_path / "profile" / "step-2-3" / "rank-0.txt").read_text()
    assert "aten::mm" in text


def test_more_processes_than_gpus_are_refused_with_the_number_of_gpus(recipe: Path, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus + 1}"]
    command = [*launcher, "-m", "mm", "train", str(recipe), f"run={tmp_path}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert f"process {gpus} of this machine has no GPU: there are {gpus}" in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["dense", "bidirectional media", "token choice"])
def test_a_model_says_and_scores_on_a_gpu_as_on_a_cpu(on_cpu: dict[str, Path], name: str) -> None:
    trained = load_trained(on_cpu[name])
    said, scored = [], []
    for device in ("cpu", "cuda"):
        answerer = ModelAnswerer(trained.model, trained.processor, device=device)
        prompts = [Prompt(picture(number), "a red cat") for number in range(3)]
        said.append(answerer.generate([*prompts, Prompt(None, "the dog")], max_tokens=12))
        asked = [ScoredQuestion(one.picture, one.text, ("one", "blue hat", "on the mat")) for one in prompts]
        scored.append([[option.logprob for option in options] for options in answerer.score(asked)])
    assert said[0] == said[1]
    assert scored[0] == [pytest.approx(options, rel=1e-4) for options in scored[1]]


def test_a_run_with_codes_draws_the_same_pictures_on_a_gpu(tmp_path: Path, tokenizer_folder: Path) -> None:
    experts = {"groups": {"text": 2, "image": 2}, "router": "token_choice"}
    run = fused(tmp_path, tokenizer_folder, experts=experts)
    sheets = []
    for device in ("cpu", "cuda"):
        options = ["--prompt", "red over blue", "--pictures", "2", "--size", "24", "--temperature", "0"]
        found = CliRunner().invoke(
            app, ["generate", str(run), *options, "--device", device, "--out", str(tmp_path / device)]
        )
        assert found.exit_code == 0, found.output
        sheets.append((tmp_path / device / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1]


# -------------------------------------------------------------------------------------------------------------- layers


def on_both(compute: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by float64 inputs on the CPU, and by bf16 ones on the GPU; both as float64 on the CPU."""
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        given = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in inputs]
        output = compute(*given)
        upstream = torch.linspace(-1, 1, output.numel()).view(output.shape).to(device, output.dtype)
        results.append([one.detach().double().cpu() for one in (output, *torch.autograd.grad(output, given, upstream))])
    return results[0], results[1]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("counts", [[3, 0, 40, 21], [64, 0, 0, 0], [16, 16, 16, 16]])
def test_experts_of_unequal_numbers_of_tokens_multiply_as_the_reference(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = {
        (device, dtype): ExpertGroup(32, 48, len(counts), Experts({"text": len(counts)}), 0, None).to(device, dtype)
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16))
    }
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tokens = torch.randn(sum(counts), 32, generator=generator)
    weights = [torch.randn(m.weight.shape, generator=generator) / 6 for m in _linears(groups["cpu", torch.float64])]

    def compute(tokens: Tensor, *weights: Tensor) -> Tensor:
        group = groups[tokens.device.type, tokens.dtype]
        for module, weight in zip(_linears(group), weights, strict=True):
            del module.weight
            module.weight = weight
        return group._compute_each(tokens, expert.to(tokens.device))

    expected, found = on_both(compute, tokens, *weights)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 0.02


def _linears(group: ExpertGroup) -> list[Any]:
    return [group.gate, group.up, group.down]


@pytest.mark.parametrize("backend", ["masked", "flex"])
def test_attention_inside_media_has_the_gradients_of_the_reference(backend: str) -> None:
    lengths = [37, 5, 130, 64]
    spans = torch.zeros(sum(lengths), dtype=torch.int32)
    spans[3:19], spans[44:60], spans[100:150] = 1, 2, 3
    q, k, v = (
        torch.randn(sum(lengths), count, 64, generator=torch.Generator().manual_seed(count)) for count in (6, 2, 2)
    )

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = Layout.of(lengths, q.device.type, spans=spans)
        return BACKENDS[backend if q.is_cuda else "masked"].run(q, k, v, layout)

    expected, found = on_both(compute, q, k, v)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 0.02


@pytest.mark.parametrize("vocabulary", [1000, 9001])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_chunked_loss_in_bf16_has_the_gradients_of_the_reference(smoothing: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(500, 64, generator=generator), torch.randn(vocabulary, 64, generator=generator) / 8
    labels, weights = torch.randint(vocabulary, (500,), generator=generator), torch.rand(500, generator=generator)

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        device = hidden.device
        return linear_cross_entropy(
            hidden, weight, labels.to(device), weights.to(device), 1e-4, smoothing, chunk=96
        ).total[None]

    expected, found = on_both(compute, hidden, weight)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chunked_loss_of_wide_inputs_is_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator, dtype=torch.float64) / 4 for rows in (300, 9001))
    labels, weights = torch.randint(9000, (300,), generator=generator), torch.rand(300, generator=generator)
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        given = [tensor.to(device, kind).requires_grad_() for tensor in (hidden, weight)]
        rest = (labels.to(device), weights.to(device), 1e-4, 0.1, 128, 9000)
        losses = linear_cross_entropy(*given, *rest)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(*given, *rest).nll, losses.nll)
        found.append([losses.total, losses.nll, losses.lse, *torch.autograd.grad(losses.total, given)])
    for one, other in zip(*found, strict=True):
        assert error(other.detach().double().cpu(), one.detach().double()) < (1e-10 if dtype == torch.float64 else 1e-5)


def test_the_loss_is_computed_by_its_kernel() -> None:
    cross_entropy_kernel = pytest.importorskip("mm.layers.cross_entropy_kernel")
    assert cross_entropy._by_kernel() is cross_entropy_kernel.logits_to_gradient
