"""The decoder on a packed stream: the same as document by document, in values, gradients and counted work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm.layers.layout import Layout
from mm.layers.rope import Rope
from mm.model.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocabulary=50, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, rope=Rope(1e4), tied=True
)
EVERY_OPTION = replace(CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm="rms", tied=False)
SIZES = {"llama": CONFIG, "every option": EVERY_OPTION}


def decoder(config: DecoderConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Decoder:
    """Random weights, large enough that attention is not uniform; biases and norms random too."""
    model = Decoder(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def tokens_of(lengths: list[int]) -> Tensor:
    return torch.randint(0, CONFIG.vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(1))


def logits(model: Decoder, tokens: Tensor, lengths: list[int]) -> Tensor:
    layout = Layout.of(lengths)
    return model(model.embed(tokens), layout.positions, layout) @ model.head_weight.T


def gradients(model: Decoder, total: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=6))
def test_packed_logits_and_gradients_equal_those_of_separate_documents(
    config: DecoderConfig, lengths: list[int]
) -> None:
    model, tokens = decoder(config), tokens_of(lengths)
    upstream = torch.randn(len(tokens), config.vocabulary, dtype=torch.float64)
    packed = logits(model, tokens, lengths)
    alone = torch.cat([logits(model, document, [len(document)]) for document in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-12)
    of_packed, of_alone = (gradients(model, (output * upstream).sum()) for output in (packed, alone))
    for name in of_packed:
        scale = of_alone[name].abs().max()
        torch.testing.assert_close(of_packed[name], of_alone[name], rtol=1e-10, atol=float(1e-10 * scale))


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_changing_one_document_leaves_the_others_unchanged(config: DecoderConfig) -> None:
    lengths = [7, 7, 40, 6, 70]
    model, tokens = decoder(config, torch.float32), tokens_of(lengths)
    changed = tokens.clone()
    changed[7:14] = (changed[7:14] + 1) % config.vocabulary
    one, two = logits(model, tokens, lengths), logits(model, changed, lengths)
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[7:14] = False
    assert torch.equal(one[others], two[others])
    assert not torch.allclose(one[~others], two[~others])


def test_no_token_sees_what_follows_it() -> None:
    model, tokens = decoder(), tokens_of([12])
    changed = tokens.clone()
    changed[8:] = (changed[8:] + 1) % CONFIG.vocabulary
    one, two = logits(model, tokens, [12]), logits(model, changed, [12])
    torch.testing.assert_close(one[:8], two[:8], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one[8:], two[8:])


def test_positions_are_the_callers() -> None:
    """RoPE sees distances only: a document that starts at 100 is the same document."""
    model, tokens, layout = decoder(), tokens_of([9]), Layout.of([9])
    hidden = model.embed(tokens)
    here = model(hidden, layout.positions, layout)
    torch.testing.assert_close(model(hidden, layout.positions + 100, layout), here, rtol=0, atol=1e-10)
    assert not torch.allclose(model(hidden, layout.positions * 3, layout), here, atol=1e-3)


def test_the_gradient_reaches_the_embeddings_of_a_frozen_decoder() -> None:
    model, layout = decoder().requires_grad_(False), Layout.of([5, 9])
    hidden = torch.randn(14, CONFIG.width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x, layout.positions, layout), (hidden,), fast_mode=True)


def test_a_backend_is_chosen_on_the_decoder() -> None:
    model, tokens, lengths = decoder(), tokens_of([5, 9]), [5, 9]
    expected = logits(model, tokens, lengths)
    model.attention_backend = "documents"
    torch.testing.assert_close(logits(model, tokens, lengths), expected, rtol=1e-10, atol=1e-12)
    model.attention_backend = "slow"
    with pytest.raises(ValueError, match="'slow'"):
        logits(model, tokens, lengths)


def test_weights_filled_after_the_meta_device_are_those_of_direct_construction() -> None:
    direct = Decoder(EVERY_OPTION)
    direct.reset_parameters(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        model = Decoder(EVERY_OPTION)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(3))
    expected = direct.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not list(model.buffers()), "a buffer would be left without values"


def test_initial_deviations_are_as_documented() -> None:
    model = Decoder(replace(EVERY_OPTION, width=128, ffn=512, layers=8))
    residual = 0.02 / 4
    expected = {"attention.query": 0.02, "attention.output": residual, "feed_forward.down": residual}
    for name, deviation in expected.items():
        weight = model.get_submodule(f"layers.5.{name}").weight
        assert isinstance(weight, Tensor)
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = Decoder(CONFIG), Decoder(EVERY_OPTION)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is not untied.embedding.weight
    assert untied.head_weight.shape == (CONFIG.vocabulary, CONFIG.width)


def test_counted_work_is_what_torch_counts() -> None:
    """Documents of one token: there the causal half of the scores is all of them."""
    model, layout = decoder(), Layout.of([1] * 6)
    tokens = tokens_of([6])
    with FlopCounterMode(display=False) as counter:
        hidden = model(model.embed(tokens), layout.positions, layout)
    assert model.flops([1] * 6) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        _ = hidden @ model.head_weight.T
    assert model.head_flops(6) == counter.get_total_flops()


def test_work_of_attention_grows_with_the_pairs_of_a_document() -> None:
    model = Decoder(CONFIG)
    pairs = 10 * 11 / 2 - 2 * (5 * 6 / 2)
    per_pair = 2 * 2 * CONFIG.heads * CONFIG.head_dim * CONFIG.layers
    assert model.flops([10]) - model.flops([5, 5]) == pairs * per_pair


def test_blocks_are_the_layers() -> None:
    model = Decoder(CONFIG)
    assert len(model.blocks()) == CONFIG.layers
    in_blocks = sum(parameter.numel() for block in model.blocks() for parameter in block.parameters())
    outside = CONFIG.vocabulary * CONFIG.width + CONFIG.width
    assert sum(parameter.numel() for parameter in model.parameters()) == in_blocks + outside


@pytest.mark.parametrize(("sizes", "message"), [({"kv_heads": 3}, "multiple of kv_heads=3"), ({"head_dim": 7}, "odd")])
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **sizes)
