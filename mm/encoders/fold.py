"""BatchNorm folded into the convolution before it: fewer passes over memory in a frozen network.

γ · (W ∗ x + b − μ) / σ + β   =   (γ/σ · W) ∗ x + (γ/σ · (b − μ) + β)
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mm.encoders.shapes import trace

TOLERANCE = 1e-4
"""Largest difference that folding may make, relative to the largest feature."""


@torch.no_grad()
def fold_batch_norm(network: nn.Module, rows: int, columns: int) -> int:
    """Fold every BatchNorm2d that directly follows a convolution, in place, and return how many were folded.

    The activation that timm keeps inside its norm layers stays. The features before and after are compared on a picture
    of rows × columns, unless the network is on the meta device and has none.

    Raises:
        ValueError: nothing to fold, or the features came out differently: some convolution feeds more than its norm.
    """
    pairs = _pairs(network, torch.empty(1, 3, rows, columns, device="meta"))
    if not pairs:
        raise ValueError(f"fold: no BatchNorm of {type(network).__name__} follows a convolution directly")
    on_meta = next(network.parameters()).is_meta
    picture = torch.empty(0) if on_meta else torch.arange(3.0 * rows * columns).sin().view(1, 3, rows, columns)
    before = torch.empty(0) if on_meta else network(picture)

    for name, convolution in pairs.items():
        norm = network.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))

    if not on_meta:
        difference = float((network(picture) - before).abs().max() / before.abs().max())
        if not difference < TOLERANCE:
            raise ValueError(f"fold: folding changes the features of {type(network).__name__} by {difference:.1e}")
    return len(pairs)


def _pairs(network: nn.Module, example: Tensor) -> dict[str, nn.Conv2d]:
    """The convolution before each norm, by the name of the norm, found by running the network on the meta device.

    A pair is a norm whose input is the very tensor that a convolution gave. Layers that run more than once have none.
    """
    source: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # kept alive, so that no id is used twice
    found: list[tuple[str, nn.Conv2d]] = []

    def after_convolution(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs.append(output)
        source[id(output)] = module

    def before_norm(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in source:
            found.append((name, source[id(inputs[0])]))

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(partial(before_norm, name)))
    try:
        trace(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(id(convolution) for _, convolution in found) + Counter(name for name, _ in found)
    return {name: convolution for name, convolution in found if uses[id(convolution)] == uses[name] == 1}
