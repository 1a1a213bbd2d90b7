"""Modality experts and depth routing: who is computed by whom, and that nothing else changes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mm.layers.layout import Layout
from mm.layers.noise import dropout, logistic, uniform
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.depth import Depth, highest
from mm.model.experts import ALL, ExpertGroup, Experts, Gate, ModalityExperts, Rank, members
from mm.model.stream import Reports, Routing, Stream
from mm.sample import Modality
from mm.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

D = 32
CONFIG = DecoderConfig(vocabulary=97, width=D, layers=3, heads=2, kv_heads=1, head_dim=16, ffn=48)
FOUR = Experts({"text": 4, "image": 4}, noise=False)
TEXT, IMAGE = 0, 1


def layout(lengths: Sequence[int], packs: Sequence[int], seed: int = 0, padding: int = 0) -> Layout:
    """Documents of these lengths in packs of these numbers of documents, their tokens of random modalities."""
    draw = torch.Generator().manual_seed(seed)
    plain = Layout.of(lengths)
    ends = torch.tensor([0, *packs]).cumsum(0)
    groups = torch.randint(0, 2, (sum(lengths),), generator=draw).to(torch.int8)
    if padding:
        groups[-padding:] = -1
    return replace(plain, packs=plain.offsets[ends], groups=groups, seeds=torch.arange(len(packs)) + 100)


def decoder(seed: int = 0, **options: Any) -> Decoder:
    torch.manual_seed(seed)
    built = Decoder(replace(CONFIG, **options)).double()
    for name, parameter in built.named_parameters():
        if "router" in name or "score" in name:  # spread, so that no choice hangs on rounding
            torch.nn.init.normal_(parameter, std=0.5)
    return built.train()


def hidden(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed_forward(model: Decoder) -> Any:
    """That of the first layer."""
    return model.layers[0].feed_forward


def stream(of: Layout, **options: Any) -> Stream:
    nothing = torch.zeros(of.tokens, 1, 1)
    return Stream((nothing, nothing), of, **options)  # type: ignore[arg-type]


def groups_of(layer: ModalityExperts) -> list[Any]:
    return list(layer.groups.values())


def experts(options: Experts, seed: int = 0, **more: Any) -> ModalityExperts:
    torch.manual_seed(seed)
    return ModalityExperts(D, 48, options, layer=0, **more).double()


def run(model: Decoder, values: Tensor, of: Layout) -> Tensor:
    return model(values, of.positions, of)


def picks(group: Any, values: Tensor, of: Layout, number: int) -> tuple[Tensor, Tensor]:
    """(E, R) positions that each expert takes, and the (E, R) scores of those."""
    found = members(of, number, group.experts, group.options.capacity, group.options.scope)
    logits = group._logits(values[found.index]).detach()
    picked = group._pick(logits, stream(of), found)
    return found.index[picked], logits.T.gather(1, picked)


# ------------------------------------------------------------------------------------------------------ expert choice


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_every_expert_takes_the_best_tokens_of_its_modality_up_to_its_capacity(capacity: float) -> None:
    of, values = layout([9, 30, 2, 17, 21], [2, 3]), hidden(79)
    layer = experts(replace(FOUR, capacity=capacity))
    for number, group in enumerate(groups_of(layer)):
        picked, _ = picks(group, values, of, number)
        for expert in range(4):
            for pack, (start, stop) in enumerate([(0, 39), (39, 79)]):
                inside = [i for i in range(start, stop) if of.groups is not None and of.groups[i] == number]
                scores = group._logits(values).detach()[:, expert]
                best = sorted(inside, key=lambda i: -float(scores[i]))[: int(len(inside) * capacity / 4)]
                taken = [i for i in picked[expert].tolist() if start <= i < stop]
                assert sorted(taken) == sorted(best), (number, expert, pack)


def test_the_output_is_the_sum_over_the_experts_that_took_a_token_weighted_with_their_gates() -> None:
    of, values = layout([40], [1]), hidden(40)
    layer = experts(FOUR)
    found = layer(values, stream(of))
    expected = torch.zeros_like(values)
    for number, group in enumerate(groups_of(layer)):
        picked, _ = picks(group, values, of, number)
        gate, up, down = (part.weight.view(4, -1, part.in_features) for part in (group.gate, group.up, group.down))
        for expert, positions in enumerate(picked):
            x = values[positions]
            y = (torch.nn.functional.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T
            expected[positions] += torch.sigmoid(x @ group.router.weight[expert])[:, None] * y
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("norm", "gate"), [("pre", "after_norm"), ("post", "after_norm"), ("post", "before_norm")])
def test_a_token_that_no_expert_takes_passes_the_feed_forward_as_it_is(norm: str, gate: str) -> None:
    of, values = layout([60], [1]), hidden(60)
    model = decoder(layers=1, norm=norm, experts=replace(FOUR, capacity=0.5, gate=gate))
    block: Any = model.layers[0]
    with_attention: list[Tensor] = []
    block.feed_forward.register_forward_pre_hook(lambda module, args: with_attention.append(args[0]))
    inputs: list[Tensor] = []
    block.feed_forward_norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    after: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: after.append(output))
    run(model, values, of)
    before = inputs[0] if norm == "pre" else with_attention[0]
    taken: set[int] = set()
    for number, group in enumerate(block.feed_forward.groups.values()):
        taken |= set(picks(group, with_attention[0], of, number)[0].flatten().tolist())
    passed = sorted(set(range(60)) - taken)
    assert len(passed) > 20
    assert torch.equal(after[0][passed], before[passed])
    assert not torch.isclose(after[0][sorted(taken)], before[sorted(taken)]).all(1).any()


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_tokens_of_one_modality_never_change_what_experts_make_of_another(router: str) -> None:
    of, values = layout([25, 40], [2]), hidden(65)
    layer = experts(replace(FOUR, router=router))
    image = of.groups == IMAGE
    others = torch.where(image[:, None], values, hidden(65, seed=1))
    one, other = layer(values, stream(of)), layer(others, stream(of))
    assert torch.equal(one[image], other[image])
    assert not torch.isclose(one[~image], other[~image]).all()


@pytest.mark.parametrize("routing", get_args(Routing))
def test_tokens_that_no_expert_takes_are_counted_outside_of_training(routing: Routing) -> None:
    of, values = layout([40, 24], [2], padding=5), hidden(64)
    layer = experts(replace(FOUR, auxiliary=True))
    reports = Reports()
    layer(values, stream(of, routing=routing, reports=reports))
    assert not reports.untaken
    added = layer.eval()(values, stream(of, routing=routing, reports=reports))
    assert of.groups is not None
    real = of.groups >= 0
    passed = int((added[real] == 0).all(1).sum())
    assert sum(int(none) for none, _ in reports.untaken) == passed > 0
    assert sum(tokens for _, tokens in reports.untaken) == int(real.sum())


def test_experts_that_agree_take_other_tokens_where_shares_are_ranked() -> None:
    """By scores, experts whose scores differ little all take the tokens that all of them score highest."""
    of, values = layout([64], [1]), hidden(64)
    together = replace(of, groups=torch.zeros(64, dtype=torch.int8))
    untaken = {}
    for rank in get_args(Rank):
        layer = experts(Experts({ALL: 4}, rank=rank, noise=False)).eval()
        (group,) = groups_of(layer)
        with torch.no_grad():
            group.router.weight.copy_(group.router.weight[:1] + 0.01 * group.router.weight)
        reports = Reports()
        layer(values, stream(together, reports=reports))
        untaken[rank] = int(reports.untaken[0][0])
    assert untaken["score"] > 40
    assert untaken["share"] < 32


def test_permuted_tokens_give_permuted_outputs() -> None:
    of, values = layout([50], [1]), hidden(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert of.groups is not None
    permuted = replace(of, groups=of.groups[order])
    for options in (FOUR, Experts({ALL: 8}), replace(FOUR, router="token_choice", top=2)):
        layer = experts(options)
        torch.testing.assert_close(layer(values[order], stream(permuted)), layer(values, stream(of))[order])


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_a_group_without_tokens_gives_its_parameters_a_gradient_of_zero(router: str) -> None:
    """Ranks meet for the gradients of every parameter, whatever modalities their batches hold."""
    of, values = layout([20], [1]), hidden(20)
    only_text = replace(of, groups=torch.zeros(20, dtype=torch.int8))
    layer = experts(replace(FOUR, router=router))
    reports = Reports()
    total = layer(values, stream(only_text, draws=True, reports=reports)).sum()
    torch.stack([total, *reports.balance]).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.startswith("groups.text"), name


def test_padding_is_taken_by_no_expert_and_takes_no_capacity() -> None:
    padded, values = layout([30, 20], [2], padding=20), hidden(50)
    assert padded.groups is not None
    alone = replace(Layout.of([30]), groups=padded.groups[:30])
    for options in (FOUR, Experts({ALL: 3}), replace(FOUR, router="token_choice")):
        layer = experts(options)
        output = layer(values, stream(padded))
        assert torch.equal(output[:30], layer(values[:30], stream(alone)))
        assert not output[30:].any()


def test_one_expert_for_all_is_the_dense_feed_forward() -> None:
    dense, mixed = decoder(), decoder(experts=Experts({ALL: 1}))
    renamed = {
        name.replace("feed_forward.", f"feed_forward.groups.{ALL}."): p for name, p in dense.state_dict().items()
    }
    renamed = {name.replace(f"groups.{ALL}.norm", "norm"): tensor for name, tensor in renamed.items()}
    mixed.load_state_dict(renamed)
    of, values = layout([20, 9], [2]), hidden(29)
    assert of.groups is not None
    together = replace(of, groups=of.groups.clamp(max=0))
    torch.testing.assert_close(run(mixed, values, together), run(dense, values, of), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the same in any micro-batch, within a pack


OPTIONS: dict[str, dict[str, Any]] = {
    "expert choice": {"experts": FOUR},
    "with noise": {"experts": replace(FOUR, noise=True)},
    "mixed": {"experts": Experts({ALL: 8})},
    "token choice": {"experts": replace(FOUR, router="token_choice", top=2)},
    "post-norm": {"experts": FOUR, "norm": "post"},
    "depth": {"depth": Depth(0.25)},
    "depth and experts": {"experts": replace(FOUR, noise=True), "depth": Depth(0.5)},
    "dropout": {"dropout": 0.2},
    "untied": {"experts": FOUR, "untied": ("attention", "norms"), "qk_norm": "layer"},
    "auxiliary": {"experts": replace(FOUR, auxiliary=True), "depth": Depth(0.5, auxiliary=True)},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_packs_give_the_same_outputs_and_gradients_together_and_alone(case: str) -> None:
    model = decoder(**OPTIONS[case])
    of, values = layout([9, 30, 2, 17, 21], [2, 2, 1], padding=5), hidden(79)
    assert of.packs is not None
    assert of.groups is not None
    assert of.seeds is not None
    toward = hidden(79, seed=5)
    found, gradients = [], []
    for packs in ([range(3)], [range(1), range(1, 3)], [range(1), range(1, 2), range(2, 3)]):
        model.zero_grad()
        outputs = []
        for some in packs:
            start, stop = int(of.packs[some.start]), int(of.packs[some.stop])
            inside = (of.offsets >= start) & (of.offsets <= stop)
            part = Layout(
                of.offsets[inside] - start,
                of.device,
                packs=of.packs[some.start : some.stop + 1] - start,
                groups=of.groups[start:stop],
                seeds=of.seeds[some.start : some.stop],
            )
            reports = Reports()
            output = model(values[start:stop], part.positions, part, reports=reports)
            extra = [*reports.balance, *(loss for loss, *_ in reports.imitation)]
            torch.stack([(output * toward[start:stop]).sum(), *extra]).sum().backward()
            outputs.append(output.detach())
        found.append(torch.cat(outputs))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for output, gradient in zip(found[1:], gradients[1:], strict=True):
        torch.testing.assert_close(output, found[0], rtol=1e-10, atol=1e-12)
        assert gradient.keys() == gradients[0].keys()
        for name, values_ in gradient.items():
            torch.testing.assert_close(values_, gradients[0][name], rtol=1e-10, atol=1e-12, msg=name)


def test_batch_scope_compares_the_tokens_of_a_micro_batch() -> None:
    of, values = layout([40, 40], [1, 1]), hidden(80)
    layer = experts(replace(FOUR, scope="batch"))
    assert of.groups is not None
    one_pack = replace(of, packs=None)
    torch.testing.assert_close(layer(values, stream(of)), layer(values, stream(one_pack)))
    assert not torch.allclose(layer(values, stream(of)), experts(FOUR)(values, stream(of)))


# ------------------------------------------------------------------------------------------- gradients of the routers


def router_gradients(norm: str, gate: Gate) -> dict[str, float]:
    """Norm of the gradient of every router, relative to that of its experts, over tokens that one expert takes."""
    of, values = layout([64], [1]), hidden(64)
    model = decoder(norm=norm, experts=Experts({"text": 1, "image": 2}, capacity=1.0, gate=gate))
    (run(model, values, of) * hidden(64, seed=3)).sum().backward()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertGroup) and module.router is not None:
            assert module.router.weight.grad is not None
            assert module.up.weight.grad is not None
            found[name] = float(module.router.weight.grad.norm() / module.up.weight.grad.norm())
    assert len(found) == 3
    return found


@pytest.mark.parametrize(("norm", "gate"), [("pre", "after_norm"), ("post", "after_norm"), ("post", "before_norm")])
def test_every_router_gets_a_gradient(norm: str, gate: Gate) -> None:
    assert min(router_gradients(norm, gate).values()) > 1e-6


def share_of_router(gate: Gate, norm_eps: float) -> float:
    """The router's gradient over that of `up`, from the tokens that one of two experts takes, behind a post-norm."""
    of, values = layout([32], [1]), hidden(32)
    model = decoder(layers=1, norm="post", norm_eps=norm_eps, experts=Experts({ALL: 2}, noise=False, gate=gate))
    (group,) = feed_forward(model).groups.values()
    into: list[Tensor] = []
    group.register_forward_pre_hook(lambda module, args: into.append(args[0]))
    together = replace(of, groups=torch.zeros(32, dtype=torch.int8))
    output = run(model, values, together)
    picked, _ = picks(group, into[0], together, 0)
    counts = picked.flatten().bincount(minlength=32)
    assert set(counts.tolist()) == {0, 1, 2}
    (output * hidden(32, seed=3))[counts == 1].sum().backward()
    return float(group.router.weight.grad.norm() / group.up.weight.grad.norm())


def test_a_norm_behind_the_gate_takes_the_gate_of_a_token_with_one_expert_out_again() -> None:
    """Why gates stand behind the norm by default: RMSNorm(g · y) = RMSNorm(y), so a single expert's gate has no say.

    It has as long as outputs are as small as the norm's ε.
    """
    shares = {(gate, eps): share_of_router(gate, eps) for gate in get_args(Gate) for eps in (1e-5, 1e-12)}
    print(shares)
    assert min(shares["after_norm", 1e-5], shares["before_norm", 1e-5], shares["after_norm", 1e-12]) > 1e-3
    assert shares["before_norm", 1e-12] < 1e-6


# -------------------------------------------------------------------------------------------------------- token choice


def test_token_choice_is_causal_and_keeps_documents_apart() -> None:
    of = layout([12, 20], [2])
    model = decoder(experts=replace(FOUR, router="token_choice", top=2))
    values, other = hidden(32), hidden(32)
    other[7:12] = hidden(5, seed=8)  # later tokens of the first document
    one, two = run(model, values, of), run(model, other, of)
    torch.testing.assert_close(two[:7], one[:7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two[12:], one[12:], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(one[7:12], two[7:12]).all()


def test_balance_is_least_where_tokens_are_spread_evenly() -> None:
    group = experts(Experts({ALL: 4}, router="token_choice")).groups[ALL]
    assert isinstance(group, ExpertGroup)
    pack = torch.tensor([0] * 8 + [1] * 4)
    even = torch.full((12, 4), 0.25)
    assert group._imbalance(even, torch.arange(12)[:, None] % 4, pack, 2) == pytest.approx(12)
    one_hot = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert group._imbalance(one_hot, torch.zeros(12, 1, dtype=torch.int64), pack, 2) == pytest.approx(48)


# --------------------------------------------------------------------------------------------------------------- depth


def test_a_routed_layer_leaves_the_tokens_that_it_does_not_choose_as_they_are() -> None:
    of, values = layout([20, 20, 24], [2, 1], padding=4), hidden(64)
    model = decoder(layers=1, depth=Depth(0.25))
    changed = ~torch.isclose(model.layers[0](values, positioned(of)), values).all(1)
    assert of.groups is not None
    assert not changed[of.groups < 0].any()
    assert [int(changed[:40].sum()), int(changed[40:].sum())] == [10, 5]


def test_a_token_that_a_layer_leaves_out_is_not_attended_to() -> None:
    of, values = layout([24], [1]), hidden(24)
    model = decoder(layers=1, depth=Depth(0.5))
    block: Any = model.layers[0]
    assert block.depth is not None
    scores = values @ block.depth.score.weight[0]
    kept = highest(scores, of, 0.5)
    left_out = sorted(set(range(24)) - set(kept.tolist()))
    direction = block.depth.score.weight[0] / block.depth.score.weight[0].norm()
    change = hidden(24, seed=5)
    change -= (change @ direction)[:, None] * direction  # scores stay what they were
    other = values.clone()
    other[left_out] += change[left_out]
    one, two = (block(x, positioned(of)) for x in (values, other))
    assert (one[left_out] != two[left_out]).any()
    torch.testing.assert_close(one[kept], two[kept], rtol=1e-12, atol=1e-12)


def test_the_router_of_a_layer_gets_a_gradient_and_scales_what_the_layer_adds() -> None:
    of, values = layout([24], [1]), hidden(24)
    model = decoder(layers=1, depth=Depth(0.5))
    block: Any = model.layers[0]
    assert block.depth is not None
    output = block(values, positioned(of))
    logits = values @ block.depth.score.weight[0]
    kept = highest(logits, of, 0.5)
    part = positioned(of).select(kept)
    expected = values[kept] + torch.sigmoid(logits[kept])[:, None] * (block._compute(values[kept], part) - values[kept])
    torch.testing.assert_close(output[kept], expected)
    output.sum().backward()
    assert block.depth.score.weight.grad is not None
    assert block.depth.score.weight.grad.norm() > 1e-6


def test_rotary_positions_of_chosen_tokens_are_those_in_their_document() -> None:
    of = layout([10, 14], [2])
    whole = positioned(of)
    kept = torch.tensor([1, 4, 9, 10, 20])
    part = whole.select(kept)
    assert part.layout.lengths == [3, 2]
    for mine, all_of_them in zip(part.rotation, whole.rotation, strict=True):
        assert torch.equal(mine, all_of_them[kept])
    assert part.layout.keys.tolist() == of.keys[kept].tolist()


def positioned(of: Layout) -> Stream:
    from mm.layers.rope import rotation

    return Stream(rotation(CONFIG.rope, of.positions, CONFIG.head_dim, torch.float64), of)


# ------------------------------------------------------------------------------------------------------ drawn numbers


def test_noise_is_uniform_and_logistic_and_independent_between_columns_and_purposes() -> None:
    keys = layout([4096], [1]).keys
    drawn = torch.cat([uniform(keys, 3, purpose=0), uniform(keys, 3, purpose=1)], dim=1)
    assert ((drawn > 0) & (drawn < 1)).all()
    assert drawn.mean(0).sub(0.5).abs().max() < 0.02
    assert drawn.std(0).mul(12**0.5).sub(1).abs().max() < 0.02
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.05
    noise = logistic(keys, 4, purpose=0)
    assert noise.mean().abs() < 0.05
    assert noise.std().div(torch.pi / 3**0.5).sub(1).abs() < 0.03


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    keys = layout([2000], [1]).keys
    dropped = dropout(torch.ones(2000, 16), 0.25, keys, purpose=0)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)


def test_nothing_is_drawn_outside_of_training() -> None:
    of, values = layout([30], [1]), hidden(30)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"dropout": 0.3}, {}),
        ({"experts": replace(FOUR, noise=True)}, {"experts": FOUR}),
    ]
    for options, without in pairs:
        model, quiet = decoder(**options), decoder(**without)
        quiet.load_state_dict(model.state_dict())
        assert not torch.equal(run(model, values, of), run(quiet, values, of))
        assert torch.equal(run(model.eval(), values, of), run(quiet.eval(), values, of))


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"txt": 4}}, "expected some of text, image, speech, point, or only all"),
        ({"groups": {"text": 0}}, "experts.groups.text is 0"),
        ({"groups": {"text": 4}, "router": "hash"}, "experts.router is 'hash'; allowed: expert_choice, token_choice"),
        ({"groups": {"text": 4}, "rank": "logit"}, "experts.rank is 'logit'; allowed: score, share"),
        ({"groups": {"text": 4}, "by": "language"}, "experts.by is 'language'; allowed: modality, hash"),
        ({"groups": {"text": 2}, "router": "token_choice", "top": 3}, "the smallest group has 2 experts"),
        ({"groups": {"text": 2}, "router": "token_choice", "auxiliary": True}, "causal by itself"),
    ],
)
def test_options_that_do_not_fit_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**options)


def test_a_modality_without_experts_is_told() -> None:
    modality = torch.tensor([Modality.TEXT, Modality.SPEECH], dtype=torch.int8)
    with pytest.raises(ValueError, match="speech tokens and experts"):
        FOUR.group_of(torch.zeros(2, dtype=torch.int64), modality)


def test_groups_follow_the_modality_or_a_hash_that_means_nothing() -> None:
    modality = torch.tensor([0, 1, 1, 3, -1], dtype=torch.int8)
    tokens = torch.arange(5)
    assert Experts({"point": 1, "image": 2, "text": 1}).group_of(tokens, modality).tolist() == [2, 1, 1, 0, -1]
    assert Experts({ALL: 8}).group_of(tokens, modality).tolist() == [0, 0, 0, 0, -1]
    by_hash = Experts({"a": 4, "b": 4}, by="hash")
    many = torch.arange(10_000)
    groups = by_hash.group_of(many, torch.zeros(10_000, dtype=torch.int8))
    assert groups.float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(groups[many % 10_000], by_hash.group_of(many, torch.ones(10_000, dtype=torch.int8)))


# ------------------------------------------------------------------------------------------------- parameters and FLOPs

PAPER = [
    # layers, width, ffn of the paper, experts, depth, parameters in millions (arXiv 2407.21770, tables 1 and 2)
    (8, 512, 2048, 1, 92.27),
    (8, 512, 2048, 8, 209.7),
    (24, 1024, 4096, 1, 436.2),
    (24, 1024, 4096, 8, 1845.5),
    (24, 2048, 8192, 1, 1476.4),
    (24, 2048, 8192, 8, 7113.5),
    (14, 512, 2048, 1, 111.1),
    (14, 512, 2048, 8, 316.7),
    (40, 1024, 4096, 1, 637.5),
    (40, 1024, 4096, 8, 2986.0),
    (32, 2304, 9216, 1, 2340.0),
    (32, 2304, 9216, 8, 11853.0),
]


@pytest.mark.parametrize(("layers", "width", "ffn", "count", "millions"), PAPER)
def test_parameter_counts_are_the_papers(layers: int, width: int, ffn: int, count: int, millions: float) -> None:
    """Without norms and routers, which the paper's counts leave out; ⅔ of its width inside a SwiGLU, rounded."""
    groups = {ALL: 1} if count == 1 else {"text": count // 2, "image": count // 2}
    with torch.device("meta"):
        model = Decoder(
            DecoderConfig(
                vocabulary=65_536,
                width=width,
                layers=layers,
                heads=width // 64,
                kv_heads=width // 64,
                head_dim=64,
                ffn=round(ffn * 2 / 3),
                tied=False,
                experts=Experts(groups),
            )
        )
    counted = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "router" not in name)
    assert counted / 1e6 == pytest.approx(millions, rel=5e-4)


RECIPES = {"moma-90m": 209.7, "moma-435m": 1845.5, "moma-1.4b": 7113.5, "moma-1.4b-depth": 11853.0}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_papers_sizes_up_to_rounding_for_kernels(name: str) -> None:
    stages = [stage.model.decoder.resolve() for stage in Recipe.load(f"train/{name}.yaml").stage_recipes()]
    assert [config.is_causal for config in stages] == [name != "moma-1.4b-depth", False, True]
    assert all(config.ffn % 8 == 0 for config in stages)
    with torch.device("meta"):
        model = Decoder(stages[1])
    counted = sum(p.numel() for key, p in model.named_parameters() if not re.search(r"norm|router|depth\.", key))
    assert counted / 1e6 == pytest.approx(RECIPES[name], rel=2e-3)


def test_flops_a_token_do_not_grow_with_experts() -> None:
    dense, sparse = decoder(), decoder(experts=FOUR)
    assert sparse.flops([40, 7]) == dense.flops([40, 7])
    assert decoder(experts=replace(FOUR, router="token_choice", top=2)).flops([40]) > 1.3 * dense.flops([40])
    quarter = decoder(layers=2, depth=Depth(0.25)).flops([400])
    assert quarter == pytest.approx(decoder(layers=1).flops([400]) + decoder(layers=1).flops([100]), rel=1e-2)
