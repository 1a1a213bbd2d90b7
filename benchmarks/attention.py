"""Attention over a packed stream: the backends of the suite, and one call under a dense mask.

They take turns, so that a busy machine slows all of them; each turn gives one ratio, of which median, smallest and
largest are printed. A turn is one forward and backward of one layer's attention.

    python -m benchmarks.attention --tokens 4096 --shortest 12 --longest 36
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.layers.attention import BACKENDS, attend
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


def backend(name: str) -> Callable[[Tensor, Tensor, Tensor, Layout], Tensor]:
    return lambda q, k, v, layout: attend(q, k, v, layout, name)


VARIANTS = {**{name: backend(name) for name in BACKENDS}, "dense mask": dense}
"""`BACKENDS` first: what takes the device and dtype is measured, and the first of it is what training takes."""


def spans_of(layout: Layout) -> Tensor:
    """(T,) int32: the first half of every document is a picture, in which all tokens see each other."""
    half = torch.tensor(layout.lengths).repeat_interleave(torch.tensor(layout.lengths)) // 2
    inside = layout.positions.cpu() < half
    return torch.where(inside, layout.document_of_token.cpu() + 1, 0).to(torch.int32)


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--spans", action="store_true", help="bidirectional attention in half of every document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    lengths = documents(options.tokens, options.shortest, options.longest)
    layout = Layout.of(lengths, options.device)
    if options.spans:
        layout = Layout.of(lengths, options.device, spans=spans_of(layout))
    placed = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    q, k, v = (
        torch.randn(options.tokens, count, options.head_dim, requires_grad=True, **placed)
        for count in (options.heads, options.kv_heads, options.kv_heads)
    )
    upstream = torch.randn(options.tokens, options.heads, options.head_dim, **placed)
    taken = [name for name, one in BACKENDS.items() if one.takes(q, layout)]
    taken += [] if options.spans else ["dense mask"]

    def seconds(name: str, layout: Layout = layout) -> float:
        start = time.perf_counter()
        torch.autograd.grad(VARIANTS[name](q, k, v, layout), (q, k, v), upstream)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in taken:
        for _ in range(2):
            seconds(name)
    turns = [{name: seconds(name) for name in taken} for _ in range(options.turns)]
    # Masks and indices are made once a batch, and all layers share them.
    anew = [{name: seconds(name, replace(layout)) for name in taken} for _ in range(options.turns)]
    print(
        f"{len(lengths)} documents of {options.shortest} to {options.longest} tokens, {options.tokens} in all, "
        f"{options.heads}/{options.kv_heads} heads of {options.head_dim}, {options.dtype} on {options.device}, "
        f"{options.threads} threads{', spans' if options.spans else ''}"
    )
    for name in taken:
        ratios = [turn[name] / turn[taken[0]] for turn in turns]
        fastest = min(turn[name] for turn in turns) * 1e3
        spread = f"{statistics.median(ratios):5.1f} × ({min(ratios):.1f} to {max(ratios):.1f})"
        made = max(0.0, statistics.median(one[name] - other[name] for one, other in zip(anew, turns, strict=True)))
        print(
            f"{name:12} {fastest:8.2f} ms at best   {spread} the time of {taken[0]}; a batch's masks and indices "
            f"{made * 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()
