"""The weighted loss, packed, accumulated and sharded, against the formula written out in float64 for each document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from mm.model.multimodal import MultimodalLM
from mm.objectives.next_token import BINS, NextToken, weight_sums
from mm.packing.batch import IGNORE, Batch
from mm.packing.collate import CodeRun, Document, Processor
from mm.packing.weights import InversePrior, Keep, Length, Prior, Scale, targets
from mm.sample import Modality
from mm.tokenizers.text import TextTokenizer
from mm.train.optim import OptimOptions
from mm.train.parallel import Engine, World, leave_world
from tests.small_world import tiny_model, write_tokenizer

VOCABULARY, WORDS = 259, 240
"""Ids from `WORDS` on are codes of pictures."""

FACTORS = {
    "plain": [],
    "prior": [Prior(alpha=1)],
    "prior, square": [Prior(alpha=2), Length("square")],
    "inverse, twice": [InversePrior("batch"), Scale(2.0)],
    "selected": [Keep(0.4), Length("sample")],
}
OBJECTIVES = {
    "together": NextToken(),
    "half of pictures": NextToken(z_loss=1e-2, modality_weights={"image": 0.5}),
    "by modality": NextToken(z_loss=1e-3, modality_weights={"image": 2.0}, normalise="by_modality"),
    "smoothed": NextToken(label_smoothing=0.1),
}


@dataclass(frozen=True)
class Step:
    """Documents in packs of micro-batches of ranks, and what they are trained towards."""

    ranks: list[list[list[list[Document]]]]
    objective: NextToken

    @property
    def documents(self) -> list[Document]:
        return [one for rank in self.ranks for micro_batch in rank for pack in micro_batch for one in pack]

    def batches(self, processor: Processor, rank: int) -> list[Batch]:
        return [
            processor.collate(packs, [[(0, 0, row) for row, _ in enumerate(pack)] for pack in packs])
            for packs in self.ranks[rank]
        ]


def draw_document(draw: np.random.Generator, factors: Sequence) -> Document:
    """Words and a picture's codes in random order, some words without loss, with the factors of a source."""
    words, codes = int(draw.integers(1, 9)), int(draw.integers(0, 5))
    text = draw.integers(0, WORDS, words)
    picture = draw.integers(WORDS, VOCABULARY, codes)
    before = int(draw.integers(0, words + 1))
    tokens = np.concatenate([text[:before], picture, text[before:]])
    modality = np.full(len(tokens), Modality.TEXT, np.int8)
    modality[before : before + codes] = Modality.IMAGE
    weights = (draw.random(len(tokens)) < 0.8).astype(np.float32)
    items = (CodeRun(Modality.IMAGE, before, codes),) if codes else ()
    document = Document(tokens, weights, modality, items)
    values = np.where(modality == Modality.TEXT, -draw.exponential(1.0, len(tokens)), np.nan)
    product = np.ones(len(tokens))
    for factor in factors:
        product = product * factor.of(document, values)
    return replace(document, factors=product.astype(np.float32))


def draw_step(seed: int, factors: Sequence, objective: NextToken) -> Step:
    """Two ranks with two micro-batches each of one to three packs; packs may be empty."""
    draw = np.random.default_rng(seed)
    ranks = [
        [
            [[draw_document(draw, factors) for _ in range(draw.integers(0, 4))] for _ in range(draw.integers(1, 4))]
            for _ in range(2)
        ]
        for _ in range(2)
    ]
    return Step(ranks, objective)


def direct(model: MultimodalLM, processor: Processor, step: Step) -> dict[str, Tensor]:
    """Gradients of the formula, one document at a time, through all logits."""
    by_modality: dict[int, list[Tensor]] = {}
    weights: dict[int, float] = {}
    for document in step.documents:
        alone = processor.collate([[document]], [[(0, 0, 0)]])
        logits = F.linear(model.hidden(alone), model.decoder.head_weight)
        for place in np.flatnonzero(targets(document)):
            kind = int(document.modality[place])
            weight = float(np.float32(document.weights[place] * np.float32(document.factors[place])))
            log_z = logits[place - 1].logsumexp(0)
            nll = log_z - logits[place - 1, int(document.tokens[place])]
            epsilon = step.objective.label_smoothing
            loss = (1 - epsilon) * nll + epsilon * (log_z - logits[place - 1].mean())
            by_modality.setdefault(kind, []).append(weight * (loss + step.objective.z_loss * log_z**2))
            weights[kind] = weights.get(kind, 0.0) + weight
    factors = {kind: step.objective.modality_weights.get(Modality(kind).label, 1.0) for kind in weights}
    if step.objective.normalise == "by_modality":
        terms = [factors[k] * torch.stack(terms).sum() / weights[k] for k, terms in by_modality.items() if weights[k]]
        total = torch.stack(terms).sum()
    else:
        terms = [factors[kind] * torch.stack(terms).sum() for kind, terms in by_modality.items()]
        total = torch.stack(terms).sum() / sum(factors[kind] * weight for kind, weight in weights.items())
    model.zero_grad()
    total.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def shares(model: MultimodalLM, processor: Processor, step: Step) -> dict[str, Tensor]:
    """Gradients of all micro-batches of all ranks, added up in this process."""
    batches = [step.batches(processor, rank) for rank in range(2)]
    sums = [step.objective.weights(of_rank) for of_rank in batches]
    denominators = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    model.zero_grad()
    for batch in (*batches[0], *batches[1]):
        step.objective.loss(model, batch, denominators, ["source"])[0].backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-10 of the largest gradient of each parameter."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-4 * largest)
        assert float((found[name] - gradient).abs().max()) <= 1e-10 * scale, name


def small_model() -> MultimodalLM:
    return tiny_model([], vocabulary=VOCABULARY).double()


def has_loss(step: Step) -> bool:
    """Whether any label weighs anything in the objective; without, the direct formula is 0 / 0."""
    return any((one.loss_weights[targets(one)] > 0).any() for one in step.documents)


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Processor:
    return Processor(tokenizer, {})


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factors", FACTORS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_packed_accumulated_and_dealt_gradients_equal_the_formula(
    processor: Processor, one_thread: None, factors: str, objective: str, seed: int
) -> None:
    step, model = draw_step(seed, FACTORS[factors], OBJECTIVES[objective]), small_model()
    if has_loss(step):
        assert_equal(shares(model, processor, step), direct(model, processor, step))


def sharded_step(rank: int, folder: str) -> None:
    """One of two processes over which the model is sharded, in float64."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processor, world = Processor(TextTokenizer.load(f"{folder}/tokenizer"), {}), World(rank, 2, torch.device("cpu"))
    model = small_model()
    for block in (*model.blocks(), model):
        fully_shard(block)
    engine = Engine(model, torch.optim.AdamW(model.parameters()), world, OptimOptions())
    found = {}
    for name, objective in OBJECTIVES.items():
        step = draw_step(3, FACTORS["prior, square"], objective)
        batches = step.batches(processor, rank)
        weights = objective.weights(batches)
        denominators = dict(zip(weights, world.sum(list(weights.values())), strict=True))
        model.zero_grad()
        for batch in batches:
            engine.backward(objective.loss(engine.model, batch, denominators, ["source"])[0])
        found[name] = {key: full(one.grad) for key, one in model.named_parameters() if one.grad is not None}
    if rank == 0:
        torch.save(found, f"{folder}/gradients")
    dist.barrier()
    del model, engine
    leave_world()


def full(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


def test_gradients_of_a_model_sharded_over_two_processes_equal_the_formula(
    processor: Processor, one_thread: None, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    spawn(sharded_step, args=(str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    for name, objective in OBJECTIVES.items():
        step, model = draw_step(3, FACTORS["prior, square"], objective), small_model()
        assert_equal(found[name], direct(model, processor, step))


def test_what_is_told_of_weights_is_what_a_loop_over_the_labels_finds(processor: Processor) -> None:
    batch = draw_step(5, [InversePrior("batch", alpha=2, w_max=20)], NextToken()).batches(processor, 0)[0]
    labelled = batch.labels != IGNORE
    weights = batch.weights[labelled].double().tolist()
    nll = torch.rand(len(weights), generator=torch.Generator().manual_seed(0))
    found = {name: [float(one) for one in pair] for name, pair in weight_sums(batch, nll).items()}
    assert found["weights/mean"] == pytest.approx([sum(weights), len(weights)])
    assert found["weights/square"] == pytest.approx([sum(one**2 for one in weights), len(weights)])
    edges = [0.0, *(2.0**power for power in range(-5, 4)), np.inf]
    for name, low, high in zip(BINS, edges[:-1], edges[1:], strict=True):
        inside = [loss for weight, loss in zip(weights, nll.tolist(), strict=True) if low <= weight < high]
        assert found[f"weights/tokens/{name}"] == [len(inside), len(weights)]
        assert found[f"weights/loss/{name}"] == pytest.approx([sum(inside), len(inside)])
    assert sum(count > 0 for count, _ in (found[f"weights/tokens/{name}"] for name in BINS)) > 2
