"""What modality experts cost: training steps of decoders with the same FLOPs a token, against the dense one.

The arms take turns on the same batch, so that a busy machine slows all of them; each turn gives one ratio, of which
median, smallest and largest are printed. A step is forward and backward; what the update adds is timed apart, since
experts have more parameters and the more tokens a step has, the less it counts.

    python -m benchmarks.experts --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm.layers.cross_entropy import linear_cross_entropy
from mm.layers.layout import Layout
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.depth import Depth
from mm.model.experts import ALL, Experts
from mm.model.stream import Reports
from mm.sample import Modality
from mm.train.parallel import compile_blocks

PICTURE, CAPTION = 64, 32
"""Tokens of a document: codes, then words."""

LAYERS = 4

FOUR = Experts({"text": 4, "image": 4}, noise=True)

ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "0"),
    "1t1i": ({"experts": Experts({"text": 1, "image": 1})}, "−6 %"),
    "4t4i": ({"experts": FOUR}, "−17 %"),
    "8 mixed": ({"experts": Experts({ALL: 8}, noise=True)}, ""),
    "4t4i, token choice": ({"experts": replace(FOUR, router="token_choice", noise=False)}, ""),
    # Seven layers of which four are for a quarter of the tokens cost what the dense decoder's four do.
    "4t4i, depth": ({"experts": FOUR, "depth": Depth(0.25), "layers": 7}, "−31 %"),
    "4t4i, untied": ({"experts": FOUR, "untied": ("attention", "norms")}, ""),
}
"""Changes of the dense decoder, and what the paper lost (arXiv 2407.21770, section 4.5)."""


class Arm:
    """A decoder with a head, and what a step of it does."""

    def __init__(
        self, config: DecoderConfig, layout: Layout, tokens: Tensor, dtype: torch.dtype, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        with tokens.device:
            self.model = Decoder(config).to(dtype)
        if compiled:
            compile_blocks(self.model.blocks())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        groups = None if config.experts is None else config.experts.group_of(tokens.cpu(), layout.groups)  # type: ignore[arg-type]
        self.layout, self.tokens = replace(layout, groups=groups), tokens
        self.flops = self.model.flops(layout.lengths)

    def compute(self) -> None:
        self.optimizer.zero_grad()
        reports = Reports()
        layout = replace(self.layout)  # indices are made anew, as for a new batch
        hidden = self.model(self.model.embed(self.tokens), layout.positions, layout, reports=reports)
        losses = linear_cross_entropy(
            hidden, self.model.head_weight, self.tokens, torch.ones(len(hidden), device=hidden.device)
        )
        torch.stack([losses.total, *reports.balance]).sum().backward()

    def update(self) -> None:
        self.optimizer.step()


def documents(packs: int, capacity: int, device: str) -> Layout:
    """Packs of pictures with captions."""
    a_pack = capacity // (PICTURE + CAPTION)
    left = capacity - a_pack * (PICTURE + CAPTION)
    lengths = ([PICTURE + CAPTION] * a_pack + ([left] if left else [])) * packs
    layout = Layout.of(lengths, device)
    modality = torch.where(layout.positions.cpu() < PICTURE, Modality.IMAGE, Modality.TEXT).to(torch.int8)
    starts = torch.arange(packs + 1, dtype=torch.int32) * capacity
    return replace(layout, packs=starts, groups=modality, seeds=torch.arange(packs))


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1368)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as `parallel.compile` does")
    parser.add_argument("--bf16", action="store_true", help="weights and compute in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    heads = options.width // 64
    dense = DecoderConfig(8192, options.width, LAYERS, heads, heads, 64, options.ffn, qk_norm="layer", tied=False)
    layout = documents(options.packs, options.capacity, options.device)
    tokens = torch.randint(8192, (layout.tokens,), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(options.device)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    arms = {
        name: Arm(replace(dense, **changes), layout, tokens, dtype, options.compile)
        for name, (changes, _) in ARMS.items()
    }
    for arm in arms.values():
        for _ in range(3 if options.device == "cuda" else 1):
            arm.compute()
            arm.update()
    for arm in arms.values():  # a turn that does not count
        seconds(arm.compute)
    turns = [
        {name: (seconds(arm.compute), seconds(arm.update)) for name, arm in arms.items()} for _ in range(options.turns)
    ]
    place = f"{dtype} on {options.device}{', compiled' if options.compile else ''}, {options.threads} threads"
    print(f"{layout.tokens} tokens in {options.packs} packs, {LAYERS} layers of {options.width}, {place}")
    print("tokens a second against the dense decoder")
    print(f"{'':20}{'FLOPs':>7}{'step':>9}{'(spread)':>18}{'with update':>14}{'paper':>8}")
    for name, arm in arms.items():
        steps = [turn["dense"][0] / turn[name][0] - 1 for turn in turns]
        updated = [sum(turn["dense"]) / sum(turn[name]) - 1 for turn in turns]
        spread = f"({min(steps):+.0%} to {max(steps):+.0%})"
        figures = f"{statistics.median(steps):>+9.0%}{spread:>18}{statistics.median(updated):>+14.0%}"
        print(f"{name:20}{arm.flops / arms['dense'].flops:>7.2f}{figures}{ARMS[name][1]:>8}")


if __name__ == "__main__":
    main()
