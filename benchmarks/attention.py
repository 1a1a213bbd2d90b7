"""Attention over a packed stream: `buckets` against a call a document, and against one call under a dense mask.

The three take turns, so that a busy machine slows all of them; each turn gives one ratio, of which median, smallest and
largest are printed. A turn is one forward and backward of one layer's attention.

    python -m benchmarks.attention --tokens 4096 --shortest 12 --longest 36
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.layers.attention import attend
from mm.layers.layout import Layout


def documents(tokens: int, shortest: int, longest: int) -> list[int]:
    """Lengths drawn evenly between two bounds, T tokens in all."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(shortest, longest + 1, (), generator=generator))))
    return lengths


def dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """One call for the whole stream with a (T, T) mask."""
    document = layout.document_of_token
    mask = layout.derive("dense", lambda: (document[:, None] == document).tril())
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout], Tensor]] = {
    "buckets": lambda q, k, v, layout: attend(q, k, v, layout, "buckets"),
    "documents": lambda q, k, v, layout: attend(q, k, v, layout, "documents"),
    "dense mask": dense,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shortest", type=int, default=12)
    parser.add_argument("--longest", type=int, default=36)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    lengths = documents(options.tokens, options.shortest, options.longest)
    layout = Layout.of(lengths)
    q, k, v = (
        torch.randn(options.tokens, count, options.head_dim, requires_grad=True)
        for count in (options.heads, options.kv_heads, options.kv_heads)
    )
    upstream = torch.randn(options.tokens, options.heads, options.head_dim)

    def seconds(variant: Callable[[Tensor, Tensor, Tensor, Layout], Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(variant(q, k, v, layout), (q, k, v), upstream)
        return time.perf_counter() - start

    for variant in VARIANTS.values():
        seconds(variant)
    turns = [{name: seconds(variant) for name, variant in VARIANTS.items()} for _ in range(options.turns)]
    print(
        f"{len(lengths)} documents, {options.tokens} tokens, {len(layout.buckets)} buckets, "
        f"{options.heads}/{options.kv_heads} heads of {options.head_dim}, float32, {options.threads} threads"
    )
    for name in VARIANTS:
        ratios = [turn[name] / turn["buckets"] for turn in turns]
        fastest = min(turn[name] for turn in turns) * 1e3
        spread = f"{statistics.median(ratios):5.1f} × ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name:12} {fastest:8.1f} ms at best   {spread} the time of buckets")


if __name__ == "__main__":
    main()
