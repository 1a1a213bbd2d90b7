"""Attention, RoPE and RMSNorm: every backend gives what separate documents give, and documents never meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mm.layers.attention import BACKENDS, attend, attend_cache
from mm.layers.layout import PADDING, SHORT, Layout
from mm.layers.norm import rms_norm
from mm.layers.rope import Rope, inverse_frequencies, rotate, rotation

HEADS, KV_HEADS, DEPTH = 6, 2, 8
LENGTHS = [5, 1, 70, 5, 6, 24, 23, 70, 2]
ON_CPU = [name for name, backend in BACKENDS.items() if "cpu" in backend.devices]

UNFUSED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=12)


Inputs = tuple[Tensor, Tensor, Tensor]


def heads(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0, gradient: bool = False) -> Inputs:
    """Random queries, keys and values of a stream."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(tokens, count, DEPTH, dtype=dtype, generator=generator, requires_grad=gradient)

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def each(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    q, k, v = inputs
    return change(q), change(k), change(v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """(T, H, d) attention as the formula says, under a (T, T) mask."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / DEPTH**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def same_document(layout: Layout) -> Tensor:
    documents = layout.document_of_token
    return (documents[:, None] == documents).tril()


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_computes_the_formula_and_its_gradients(backend: str) -> None:
    layout = Layout.of(LENGTHS)
    inputs = heads(layout.tokens, gradient=True)
    upstream = torch.randn(layout.tokens, HEADS, DEPTH, dtype=torch.float64)
    expected = plain_attention(*inputs, same_document(layout))
    found = attend(*inputs, layout, backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = zip(*(torch.autograd.grad(output, inputs, upstream) for output in (found, expected)), strict=True)
    for of_found, of_expected in gradients:
        torch.testing.assert_close(of_found, of_expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(lengths)
def test_buckets_agree_with_separate_documents_for_any_lengths(lengths: list[int]) -> None:
    layout = Layout.of(lengths)
    inputs = heads(layout.tokens)
    torch.testing.assert_close(
        attend(*inputs, layout, "buckets"), attend(*inputs, layout, "documents"), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_document_leaves_the_others_equal_to_the_last_bit(backend: str, changed: int) -> None:
    layout = Layout.of(LENGTHS)
    before = heads(layout.tokens, torch.float32)
    start, end = layout.offsets[changed : changed + 2].tolist()
    after = each(Tensor.clone, before)
    for x, other in zip(after, heads(layout.tokens, torch.float32, seed=1), strict=True):
        x[start:end] = other[start:end]
    one, two = attend(*before, layout, backend), attend(*after, layout, backend)
    others = layout.document_of_token != changed
    assert torch.equal(one[others], two[others])
    assert not torch.equal(one[~others], two[~others])


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_document_of_nan_does_not_infect_the_others(backend: str) -> None:
    layout = Layout.of(LENGTHS)
    inputs = heads(layout.tokens, torch.float32)
    start, end = layout.offsets[4:6].tolist()
    for x in inputs:
        x[start:end] = float("nan")
    found = attend(*inputs, layout, backend)
    infected = found.isnan().flatten(1).any(1)
    assert torch.equal(infected, layout.document_of_token == 4)


@UNFUSED
@pytest.mark.parametrize("backend", ["masked", "flex"])
def test_a_branch_sees_its_trunk_and_itself_only(backend: str) -> None:
    trunk, branches, other = 7, [3, 1, 4], 5
    marks = [0] * trunk + [b for b, n in enumerate(branches, start=1) for _ in range(n)] + [0] * other
    layout = Layout.of([trunk + sum(branches), other], branches=marks)
    inputs = heads(layout.tokens)
    found = BACKENDS[backend].run(*inputs, layout)  # directly: flex is offered on CUDA only, but its mask runs here too
    start = trunk
    for length in branches:
        alone = torch.cat([torch.arange(trunk), torch.arange(start, start + length)])
        expected = attend(*each(lambda x, places=alone: x[places], inputs), Layout.of([len(alone)]), "documents")
        torch.testing.assert_close(found[alone], expected, rtol=1e-10, atol=1e-12)
        start += length
    expected = attend(*each(lambda x: x[start:], inputs), Layout.of([other]), "documents")
    torch.testing.assert_close(found[start:], expected, rtol=1e-10, atol=1e-12)


@UNFUSED
def test_the_mask_of_flex_keeps_documents_apart() -> None:
    layout = Layout.of(LENGTHS)
    inputs = heads(layout.tokens)
    expected = attend(*inputs, layout, "documents")
    torch.testing.assert_close(BACKENDS["flex"].run(*inputs, layout), expected, rtol=1e-10, atol=1e-12)


def test_branches_are_honoured_without_being_asked_for() -> None:
    layout = Layout.of([4], branches=[0, 0, 1, 2])
    inputs = heads(4)
    assert torch.equal(attend(*inputs, layout), attend(*inputs, layout, "masked"))
    assert not torch.allclose(attend(*inputs, layout), attend(*inputs, Layout.of([4])))


@pytest.mark.parametrize("backend", ["buckets", "varlen", "flex", "fastest"])
def test_a_backend_that_cannot_is_refused_with_those_that_can(backend: str) -> None:
    layout = Layout.of([4], branches=[0, 0, 1, 2])
    with pytest.raises(ValueError, match=f"{backend!r} does not take .* with branches; these do: masked$"):
        attend(*heads(4), layout, backend)


def test_a_stream_of_another_length_than_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="5 queries for a layout of 4 tokens"):
        attend(*heads(5), Layout.of([4]))


def test_half_precision_agrees_with_single() -> None:
    layout = Layout.of(LENGTHS)
    inputs = heads(layout.tokens, torch.float32)
    half = attend(*each(Tensor.bfloat16, inputs), layout)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attend(*inputs, layout), rtol=0.02, atol=0.02)


def test_cached_attention_is_the_last_row_of_full_attention() -> None:
    lengths = [4, 1, 9]
    layout = Layout.of(lengths)
    q, k, v = heads(layout.tokens)
    last = layout.offsets[1:].long() - 1
    keys, values = (torch.zeros(3, KV_HEADS, 12, DEPTH, dtype=torch.float64) for _ in range(2))
    for i, length in enumerate(lengths):
        keys[i, :, :length] = k.split(lengths)[i].transpose(0, 1)
        values[i, :, :length] = v.split(lengths)[i].transpose(0, 1)
    found = attend_cache(q[last], keys, values, torch.tensor(lengths))
    torch.testing.assert_close(found, attend(q, k, v, layout, "documents")[last], rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(lengths)
def test_buckets_hold_every_token_once_and_little_padding(lengths: list[int]) -> None:
    layout = Layout.of(lengths)
    held = torch.cat([bucket.index[bucket.real] for bucket in layout.buckets])
    assert torch.equal(held.sort().values, torch.arange(sum(lengths)))
    for bucket in layout.buckets:
        assert bucket.index.shape == (len(bucket.index), bucket.length)
        padding = int((~bucket.real).sum())
        assert padding <= PADDING * int(bucket.real.sum()) + 1e-9
        assert bucket.length <= SHORT or padding == 0
        assert torch.equal(bucket.index[~bucket.real], bucket.index[:, :1].expand_as(bucket.index)[~bucket.real])


def test_positions_and_documents_of_a_layout() -> None:
    layout = Layout.of([2, 3, 1])
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.document_of_token.tolist() == [0, 0, 1, 1, 1, 2]
    assert (layout.tokens, layout.longest) == (6, 3)


def test_rotation_is_a_complex_multiplication() -> None:
    x = torch.randn(7, 3, DEPTH, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 5, 0, 1, 900])
    angles = positions[:, None, None] * inverse_frequencies(Rope(), DEPTH, dtype=torch.float64)
    pairs = torch.complex(x[..., : DEPTH // 2], x[..., DEPTH // 2 :])
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, rotation(Rope(), positions, DEPTH, torch.float64))
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], -1), rtol=0, atol=1e-13)


def test_gradients_of_rotation_and_norm_are_right() -> None:
    x = torch.randn(5, 2, DEPTH, dtype=torch.float64, requires_grad=True)
    turns = rotation(Rope(), torch.arange(5), DEPTH, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turns), (x,))
    weight = torch.rand(DEPTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))


def test_scores_depend_on_the_distance_of_tokens_only() -> None:
    q, k = torch.randn(2, 1, 1, DEPTH, dtype=torch.float64)

    def score(query: int, key: int) -> Tensor:
        turned = [
            rotate(x, rotation(Rope(), torch.tensor([at]), DEPTH, torch.float64)) for x, at in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=0, atol=1e-12)
    assert not torch.allclose(score(7, 3), score(8, 3))


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (Rope(1e4), {"rope_type": "default"}),
        (Rope(1e4, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 512),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
    ],
)
def test_frequencies_are_those_of_transformers(rope: Rope, parameters: dict[str, object]) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={**parameters, "rope_theta": rope.base},
    )
    if rope.scaling == "none":
        expected = rope.base ** (-torch.arange(0, 64, 2) / 64)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[rope.scaling](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="'yarn' is not one of none, linear, llama3"):
        Rope(scaling="yarn")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 4, DEPTH, dtype=dtype), torch.rand(DEPTH, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (DEPTH,), weight, 1e-5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_backend_agrees_on_cuda(backend: str) -> None:
    layout = Layout.of(LENGTHS, "cuda")
    narrow = heads(layout.tokens, torch.float32)
    wide = each(lambda x: torch.cat([x, 0.5 * x.flip(-1)], -1), narrow)  # FlexAttention takes no depth below 16
    inputs = each(lambda x: x.cuda().bfloat16().requires_grad_(), wide)
    expected = attend(*each(Tensor.double, inputs), layout, "documents")
    found = attend(*inputs, layout, backend)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, upstream)
    for of_found, of_expected in zip(gradients, torch.autograd.grad(expected, inputs, upstream.double()), strict=True):
        torch.testing.assert_close(of_found, of_expected, rtol=0.05, atol=0.05)


def test_a_stream_without_tokens_gives_all_inputs_a_gradient() -> None:
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    attend(q, k, v, Layout.of([0])).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))
