"""Time and memory of the chunked head against ``F.cross_entropy(F.linear(hidden, weight), labels)``.

On a GPU also the kernels of `mm.layers.head_loss`, those that are installed and agree with the reference; others are
left out with a sentence. On a CPU every measurement is a process of its own, so that its high-water mark is its own.
The variants take turns, so that a busy machine slows all. Extra memory is what the loss and its gradients add to the
inputs.

    python -m benchmarks.cross_entropy --vocabulary 50000 150000
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.layers.cross_entropy import linear_cross_entropy
from mm.layers.head_loss import KERNELS, Backend, HeadLoss, UnusableBackend


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None) -> Tensor:
    """What one would write: all logits at once, differentiated by autograd."""
    return torch.dot(F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none"), weights)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, weights, chunk=chunk).total


def fused(backend: Backend) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None) -> Tensor:
        return HeadLoss(backend=backend)(hidden, weight, labels, weights).total

    return loss


TIMES = 10
"""Calls of a measurement on a GPU."""

VARIANTS = {"plain": plain, "chunked": chunked, **{name: fused(name) for name in KERNELS}}


def usable(device: torch.device) -> list[str]:
    """The variants that can be measured; tells why others cannot."""
    names = ["plain", "chunked"]
    for name in KERNELS:
        try:
            HeadLoss(backend=name).check(device)
            names.append(name)
        except UnusableBackend as refused:
            print(f"left out: {refused}")
    return names


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one forward and backward, and MiB that it needs beside its inputs."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    hidden = torch.randn(options.tokens, options.width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(options.vocabulary[0], options.width, dtype=dtype, device=device)
    weight = weight.mul_(options.width**-0.5).requires_grad_()
    labels = torch.randint(options.vocabulary[0], (options.tokens,), device=device)
    weights = torch.full((options.tokens,), 1 / options.tokens, device=device)
    variant = VARIANTS[options.measure]
    inputs = (hidden, weight, labels, weights)
    if device.type == "cuda":
        return measure_on_gpu(variant, inputs, options.chunk)
    # A small first call loads the libraries' code and work space, which neither variant should pay for.
    small = torch.randn(256, options.width, dtype=dtype, requires_grad=True)
    variant(small, small, labels[:256] % 256, weights[:256], None).backward()

    before = resident()
    start = time.perf_counter()
    (0.5 * variant(*inputs, options.chunk)).backward()
    return {"seconds": time.perf_counter() - start, "extra_mib": resident() - before}


def measure_on_gpu(variant: Callable[..., Tensor], inputs: tuple[Tensor, ...], chunk: int | None) -> dict[str, float]:
    """The median of `TIMES` calls, after one of the same size for which kernels are compiled and chosen."""
    seconds = []
    for _ in range(1 + TIMES):
        for tensor in inputs:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        (0.5 * variant(*inputs, chunk)).backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"seconds": statistics.median(seconds[1:]), "extra_mib": extra}


def resident() -> float:
    """High-water mark of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_by_itself(variant: str, vocabulary: int, arguments: list[str]) -> dict[str, float]:
    """In a new process on a CPU; on a GPU here, where torch keeps its memory's account."""
    alone = [*arguments, "--vocabulary", str(vocabulary), "--measure", variant]
    if parse(alone).device == "cuda":
        return measure(parse(alone))
    command = [sys.executable, "-m", "benchmarks.cross_entropy", *alone]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[50_000, 150_000])
    parser.add_argument("--chunk", type=int, default=None, help="tokens per chunk; the library's default otherwise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=VARIANTS, help="only print one measurement of this variant, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    names = usable(torch.device(options.device))
    for vocabulary in options.vocabulary:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for repeat in range(options.repeats):
            for name in sorted(names, reverse=repeat % 2 == 1):
                runs[name].append(measure_by_itself(name, vocabulary, arguments))
        print(f"T = {options.tokens}, V = {vocabulary}, D = {options.width}, {options.dtype} on {options.device}")
        for name, measured in runs.items():
            milliseconds = [1e3 * run["seconds"] for run in measured]
            memory = statistics.median(run["extra_mib"] for run in measured)
            print(
                f"  {name:18} {statistics.median(milliseconds):9.2f} ms "
                f"({min(milliseconds):.2f} to {max(milliseconds):.2f})"
                f"  {memory:8.0f} MiB extra"
            )
        for name, unit in product(names[1:], ("seconds", "extra_mib")):
            ratios = [one[unit] / other[unit] for one, other in zip(runs[name], runs["plain"], strict=True)]
            print(
                f"  {name} / plain, {unit}: {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
