"""Weights of smaller models in larger ones, from checkpoints of other libraries, from runs, and between stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mm.configure import RecipeError
from mm.layers.layout import Layout
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.experts import ALL, Experts
from mm.model.hub import save_decoder
from mm.model.multimodal import DecoderOptions
from mm.model.upcycle import NotUpcyclable, upcycle, upcycled
from mm.report.run import report_of_run
from mm.train.checkpoint import CheckpointError
from tests.small_world import DECODER, losses, seen, train_here, train_together

CONFIG = DecoderConfig(vocabulary=60, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48, tied=False)
ONE, FOUR = Experts({"text": 1, "image": 1}), Experts({"text": 4, "image": 4})


def decoder(seed: int = 0, **options: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(replace(CONFIG, **options)).double().eval()


def run(model: Decoder, seed: int = 0) -> torch.Tensor:
    """(40, 32) outputs for tokens of both modalities in one pack."""
    draw = torch.Generator().manual_seed(seed)
    of = replace(Layout.of([25, 15]), groups=torch.randint(0, 2, (40,), generator=draw).to(torch.int8))
    if model.config.experts is not None and ALL in model.config.experts.groups:
        of = replace(of, groups=torch.zeros(40, dtype=torch.int8))
    return model(torch.randn(40, 32, generator=draw, dtype=torch.float64), of.positions, of)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_dense_model_computes_the_same_with_one_expert_for_each_modality(norm: str) -> None:
    dense = decoder(norm=norm)
    torch.testing.assert_close(run(upcycled(dense, decoder(1, norm=norm, experts=ONE))), run(dense))


def test_a_dense_model_computes_the_same_with_untied_attention_and_norms() -> None:
    dense = decoder(qk_norm="rms")
    larger = decoder(1, qk_norm="rms", experts=ONE, untied=("attention", "norms"))
    torch.testing.assert_close(run(upcycled(dense, larger)), run(dense))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("of", ["dense", "one expert"])
def test_a_token_with_one_expert_goes_on_with_what_it_got_before(of: str, norm: str) -> None:
    """With routers of zero every gate is ½, and a capacity of E gives every token all E experts, so E times as much."""
    smaller = decoder(layers=1, norm=norm, experts=ONE) if of == "one expert" else decoder(layers=1, norm=norm)
    larger = upcycled(smaller, decoder(1, layers=1, norm=norm, experts=replace(FOUR, capacity=4.0)))
    added = {}
    for name, model in {"smaller": smaller, "larger": larger}.items():
        parts: list[torch.Tensor] = []
        block: Any = model.layers[0]
        for group in getattr(block.feed_forward, "groups", {}).values():
            if group.router is not None:
                torch.nn.init.zeros_(group.router.weight)
        last = block.feed_forward_norm if norm == "post" else block.feed_forward
        last.register_forward_hook(lambda module, args, output, parts=parts: parts.append(output))
        run(model)
        added[name] = parts[-1]
    torch.testing.assert_close(added["larger"], 4 * added["smaller"])


def test_a_vocabulary_grows_around_the_mean_of_its_rows() -> None:
    smaller = decoder()
    larger = upcycled(smaller, decoder(1, vocabulary=70))
    for one, other in ((larger.embedding, smaller.embedding), (larger.head, smaller.head)):
        assert one is not None
        assert other is not None
        assert torch.equal(one.weight[:60], other.weight)
        new = one.weight[60:] - other.weight.mean(0)
        assert new.abs().max() < 0.1
        assert float(new.detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("smaller", "larger", "message"),
    [
        ({"ffn": 40}, {"experts": FOUR}, r"up.weight \(192, 32\) does not come from .*up.weight \(40, 32\)"),
        ({"qkv_bias": True}, {"experts": ONE}, r"without use: layers.0.attention.query.bias"),
        ({}, {"experts": ONE, "qkv_bias": True}, r"without a counterpart: layers.0.attention.key.bias"),
        ({"experts": Experts({"text": 2, "image": 2})}, {"experts": FOUR}, r"does not come from"),
    ],
)
def test_what_no_rule_takes_is_named(smaller: dict[str, Any], larger: dict[str, Any], message: str) -> None:
    with pytest.raises(NotUpcyclable, match=message):
        upcycle(decoder(**smaller).state_dict(), decoder(**larger))


def test_a_checkpoint_of_transformers_is_upcycled_by_the_recipe(tmp_path: Path) -> None:
    dense = decoder().float()
    save_decoder(dense, tmp_path)
    options = DecoderOptions(
        pretrained=str(tmp_path), upcycle={"experts": {"groups": {"text": 1, "image": 1}}, "vocabulary": 64}
    )
    assert options.resolve().experts == ONE
    larger = options.load()
    assert larger.config.vocabulary == 64
    torch.testing.assert_close(run(larger.double().eval()), run(dense.double()), rtol=1e-5, atol=1e-6)


def test_upcycling_needs_a_checkpoint() -> None:
    with pytest.raises(RecipeError, match=r"upcycle needs `pretrained`"):
        DecoderOptions(config=DECODER, upcycle={"vocabulary": 300}).resolve()


# ----------------------------------------------------------------------------------------------------- between stages

GROUPS = ("text", "image", "speech", "point")


@pytest.fixture(scope="module")
def staged(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert a modality for two steps, then two of each, then their auxiliary routers."""
    plain = yaml.safe_load(recipe.read_text())

    def two(**more: bool) -> dict[str, Any]:
        return {"experts": {"groups": dict.fromkeys(GROUPS, 2), "noise": True, **more}}

    plain["model"]["decoder"]["config"]["experts"] = {"groups": dict.fromkeys(GROUPS, 1)}
    del plain["steps"]
    plain["stages"] = [
        {"steps": 2},
        {"steps": 3, "model": {"decoder": {"config": two()}}},
        {
            "steps": 20,
            "model": {"decoder": {"config": two(auxiliary=True)}},
            "objective": {"_target_": "mm.objectives.routers.AuxiliaryRouters"},
            # Tokens of point clouds are few and nearly alike, so what their routers learn from cancels to 1e-5. At the
            # default eps Adam divides such a gradient by its own size, rounding included: a difference of 1e-7 between
            # one process and two would grow a thousandfold in 15 steps, by how much depends on the processor.
            "optim": {"lr": 5e-2, "eps": 1e-4, "parts": [{"match": "auxiliary"}, {"match": ".", "freeze": True}]},
        },
    ]
    path = tmp_path_factory.mktemp("staged") / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def whole(staged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(staged, f"run={tmp_path_factory.mktemp('whole')}")


def test_a_stage_with_more_experts_goes_on_with_weights_and_data(whole: Path) -> None:
    assert list(losses(whole)) == list(range(1, 6))
    assert list(losses(whole, "loss/routers")) == list(range(6, 26))
    packs = [pack for step, packs in seen(whole).items() if step <= 11 for pack in packs]  # then an epoch ends
    assert len(packs) == len(set(packs)), "samples were seen twice"


def test_auxiliary_routers_learn_and_nothing_else_does(whole: Path) -> None:
    learnt = losses(whole, "loss/routers")
    assert learnt[25] < 0.8 * learnt[6]
    final = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    before = json.loads((whole / "metrics.jsonl").read_text().splitlines()[4])
    # what experts choose is as it was when they had been trained
    assert final["expert_choice/validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-6)
    assert final["validation_loss"] != final["expert_choice/validation_loss"]
    assert 0.5 < final["router_agreement"] <= 1
    assert 0 < before["tokens_without_expert"] < 1


def test_a_run_that_was_stopped_between_the_stages_goes_on_alike(staged: Path, whole: Path, tmp_path: Path) -> None:
    first = yaml.safe_load(staged.read_text())
    short = tmp_path / "recipe.yaml"
    short.write_text(yaml.safe_dump(first | {"stages": first["stages"][:1]}, sort_keys=False))
    train_here(short, f"run={tmp_path / 'run'}")
    resumed = train_here(staged, f"run={tmp_path / 'run'}")
    for figure in ("loss", "loss/routers"):
        assert losses(resumed, figure) == losses(whole, figure)


def test_the_report_tells_what_foreseeing_costs_and_keeps_the_two_losses_apart(whole: Path) -> None:
    page = report_of_run(whole)
    assert "Auxiliary routers agree with the choice" in page
    assert "Validation loss where experts look ahead" in page
    assert "Tokens that no expert took" in page
    trained = losses(whole)
    assert f"{trained[1]:.3f} → {trained[5]:.3f}" in page


def test_another_architecture_without_a_rule_is_refused_with_both_reasons(
    staged: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"of another architecture[\s\S]*cannot be upcycled either"):
        train_here(staged, f"run={tmp_path}", f"init_from={whole}", "model.decoder.config.ffn=32")


@pytest.mark.parametrize(
    "option",
    [
        "parallel.activations=full",
        pytest.param("parallel={engine: deepspeed, zero: 3}", marks=pytest.mark.slow),
    ],
)
def test_two_processes_go_through_the_stages_as_one_does(
    staged: Path, whole: Path, tmp_path: Path, option: str
) -> None:
    """Auxiliary routers train inside of frozen blocks, whose outputs have no gradient that sharding could wait for."""
    train_together(tmp_path, 2, [[str(staged), f"run={tmp_path / 'run'}", option]])
    chosen = "tokens_without_expert"  # of step 5, where experts choose: numbers are compared only where choices agree
    assert losses(tmp_path / "run", chosen)[5] == losses(whole, chosen)[5]
    for figure in ("loss", "loss/routers"):
        assert losses(tmp_path / "run", figure) == pytest.approx(losses(whole, figure), rel=1e-5)
    assert losses(tmp_path / "run", "gradient_norm") == pytest.approx(losses(whole, "gradient_norm"), rel=1e-4)
