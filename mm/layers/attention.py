"""Attention inside each document of a flat stream, with grouped queries, and the backends that compute it.

    q (T, H, d) ─┐
    k (T, K, d) ─┼─ attend(layout) ─▶ (T, H, d)      query head h reads key head h // (H/K)
    v (T, K, d) ─┘

It is causal but for the branches and spans of a `Layout`. All backends give the same result; `BACKENDS` lists them in
the order in which ``backend="auto"`` tries them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from mm.layers.layout import SHORT, Bucket, Layout

HALF = (torch.float16, torch.bfloat16)
EVERY = (*HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    run: (q, k, v, layout) -> (T, H, d)
    masks: whether it honours the branches and spans of a layout; a backend that would ignore them is refused
    devices: device types that it runs on
    dtypes: dtypes that it takes
    depth: the smallest head depth that it takes
    """

    run: Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
    masks: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = EVERY
    depth: int = 1

    def takes(self, q: Tensor, layout: Layout) -> bool:
        honours = self.masks or layout.is_plain
        able = q.device.type in self.devices and q.dtype in self.dtypes and q.shape[-1] >= self.depth
        return honours and able


@torch.compiler.disable(reason="the calls follow the lengths of documents, which differ in every batch")
def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
    """Attention within each document, causal but for branches and spans, scores scaled by d^-½.

    Args:
        q: (T, H, d) queries.
        k: (T, K, d) keys; K divides H.
        v: (T, K, d) values.
        layout: the documents of the stream.
        backend: a name in `BACKENDS`, or "auto" for the first that takes this device, dtype and layout.

    Returns:
        (T, H, d). The rows of a document depend on no other document: replacing one by another of its length leaves
        the rest equal to the last bit.

    Raises:
        ValueError: T is not the layout's, the heads do not divide, or the backend does not take these inputs.
    """
    if len(q) != layout.tokens:
        raise ValueError(f"{len(q)} queries for a layout of {layout.tokens} tokens")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if not layout.tokens:
        return q + 0.0 * (k.sum() + v.sum())  # connected, so that their weights get a gradient as on other ranks
    able = [name for name, candidate in BACKENDS.items() if candidate.takes(q, layout)]
    chosen = able[0] if backend == "auto" else backend
    if chosen not in able:
        marks = {"branches": layout.branches, "spans": layout.spans}
        kind = " with ".join(
            [f"{q.dtype} on {q.device.type}", *(name for name, mark in marks.items() if mark is not None)]
        )
        raise ValueError(f"attention backend {backend!r} does not take {kind}; these do: {', '.join(able)}")
    return BACKENDS[chosen].run(q, k, v, layout)


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """One query per sequence against its cached keys.

    Args:
        q: (B, H, d) queries of the newest token of each sequence.
        keys: (B, K, S, d) cached keys, the newest included; what lies beyond a sequence's length is not read.
        values: (B, K, S, d).
        lengths: (B,) int64 tokens of each sequence, at most S.

    Returns:
        (B, H, d).
    """
    batch, kv_heads, capacity, _ = keys.shape
    seen = torch.arange(capacity, device=q.device) < lengths[:, None]
    grouped = q.view(batch, kv_heads, -1, q.shape[-1])  # the queries that share a key head as rows: no key is repeated
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None]).reshape(q.shape)


def _documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One call a document: the reference that every other backend is compared with."""
    parts = zip(*(x.transpose(0, 1).split(layout.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_fused(*part) for part in parts], dim=1).transpose(0, 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One call a document, each with the mask of its branches and spans."""
    masks = layout.derive("masks", lambda: _masks(layout))
    parts = zip(*(x.transpose(0, 1).split(layout.lengths, dim=1) for x in (q, k, v)), masks, strict=True)
    outputs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
        for q, k, v, mask in parts
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _masks(layout: Layout) -> list[Tensor]:
    """(L, L) bool for every document: whether the row's token sees the column's."""
    masks = []
    for branch, span in zip(*(marks.split(layout.lengths) for marks in _marks(layout)), strict=True):
        own_or_trunk = (branch[None] == 0) | (branch[None] == branch[:, None])
        own_span = (span[None] == span[:, None]) & (span > 0)
        masks.append(own_or_trunk.tril() | own_span)
    return masks


def _marks(layout: Layout) -> tuple[Tensor, Tensor]:
    """(T,) int32 branch and span of every token, on the device."""
    none = torch.zeros(layout.tokens, dtype=torch.int32)
    branches, spans = (none if marks is None else marks for marks in (layout.branches, layout.spans))
    return branches.to(layout.device), spans.to(layout.device)


@dataclass(frozen=True)
class _Rows:
    """Where the heads of the stream lie in the buckets' blocks: one gather brings every bucket into (n, heads, L).

    queries: (P·H,) int64 rows of (T·H, d), bucket after bucket; P counts tokens with padding
    keys: (P·K,) int64 rows of (T·K, d)
    back: (T·H,) int64 row of the gathered queries where each of the stream's lies
    """

    queries: Tensor
    keys: Tensor
    back: Tensor


def _buckets(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One call a bucket of documents of nearly equal length."""
    heads, kv_heads, depth = q.shape[1], k.shape[1], q.shape[2]
    rows = layout.derive(("rows", heads, kv_heads), lambda: _rows(layout, heads, kv_heads))
    padded = [bucket.index.numel() for bucket in layout.buckets]
    queries = q.reshape(-1, depth).index_select(0, rows.queries).split([n * heads for n in padded])
    keys = k.reshape(-1, depth).index_select(0, rows.keys).split([n * kv_heads for n in padded])
    values = v.reshape(-1, depth).index_select(0, rows.keys).split([n * kv_heads for n in padded])
    outputs = []
    for bucket, *block in zip(layout.buckets, queries, keys, values, strict=True):
        # In full precision, short documents are fastest as plain products; SDPA sums half precision in float32.
        small = bucket.length <= SHORT and q.dtype not in HALF
        compute = _products if small else _fused
        q_block, k_block, v_block = (x.view(len(bucket.index), -1, bucket.length, depth) for x in block)
        outputs.append(compute(q_block, k_block, v_block).reshape(-1, depth))
    return torch.cat(outputs).index_select(0, rows.back).view_as(q)


def _rows(layout: Layout, heads: int, kv_heads: int) -> _Rows:
    def gathered(bucket: Bucket, count: int) -> Tensor:
        return (bucket.index[:, None] * count + torch.arange(count, device=layout.device)[:, None]).flatten()

    queries = torch.cat([gathered(bucket, heads) for bucket in layout.buckets])
    keys = torch.cat([gathered(bucket, kv_heads) for bucket in layout.buckets])
    real = torch.cat([bucket.real[:, None].expand(-1, heads, -1).flatten() for bucket in layout.buckets])
    back = torch.empty(layout.tokens * heads, dtype=torch.int64, device=layout.device)
    back[queries[real]] = real.nonzero().squeeze(1)
    return _Rows(queries, keys, back)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(…, H, L, d) causal attention of (…, H, L, d) queries with (…, K, L, d) keys and values."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n, H, L, d) like `_fused`, as two batched products with the queries that share a key head as one matrix."""
    documents, heads, length, depth = q.shape
    kv_heads = k.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    mask = future.repeat(heads // kv_heads, 1).expand(documents * kv_heads, -1, -1)
    queries, keys, values = q.reshape(documents * kv_heads, -1, depth), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=depth**-0.5)
    return torch.bmm(scores.softmax(-1), values).view_as(q)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """FlashAttention over variable lengths, in one call; shapes do not change when lengths do."""
    offsets, longest = layout.offsets_on_device, layout.longest
    return cast(Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0)))


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """FlexAttention with documents, branches and spans as a block mask. On the CPU it has no gradient: for checks."""
    mask = layout.derive("flex mask", lambda: _flex_mask(layout))
    attention = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return cast(Tensor, attention(q, k, v, block_mask=mask, enable_gqa=True))[0].transpose(0, 1)


@cache
def _compiled_flex() -> Callable[..., object]:
    return torch.compile(flex_attention)


def _flex_mask(layout: Layout) -> BlockMask:
    documents = layout.document_of_token
    branches, spans = _marks(layout)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        together = documents[query] == documents[key]
        own_or_trunk = (branches[key] == 0) | (branches[key] == branches[query])
        own_span = (spans[key] == spans[query]) & (spans[key] > 0)
        return together & ((own_or_trunk & (key <= query)) | own_span)

    return create_block_mask(visible, None, None, layout.tokens, layout.tokens, device=layout.device)


BACKENDS: dict[str, Backend] = {
    "varlen": Backend(_varlen, devices=("cuda",), dtypes=HALF),
    "buckets": Backend(_buckets),
    "masked": Backend(_masked, masks=True),
    "flex": Backend(_flex, masks=True, devices=("cuda",), dtypes=(*HALF, torch.float32), depth=16),
    "documents": Backend(_documents),
}
"""Backends by name, the first that takes the inputs is the default."""
