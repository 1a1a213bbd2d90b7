"""Weights of a smaller model in a larger one: experts from a feed-forward, parts by modality from shared ones.

    feed_forward.up (F, D) ──────────▶ groups.text.up (4·F, D), groups.image.up (4·F, D)       each expert a copy
    groups.text.up (F, D) ───────────▶ groups.text.up (4·F, D)                                 MoMa, section 2.5
    attention.query ─────────────────▶ attention.query.groups.text, attention.query.groups.image
    embedding (V, D) ────────────────▶ embedding (V′, D)                                       new rows: their mean

Routers begin as they were drawn. Their gates are near ½, so what experts write back is doubled if they come from one
without a gate: a token that gets one expert goes on with what it got before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mm.model.decoder import Decoder
from mm.model.experts import ALL, ExpertGroup

FRESH = re.compile(r"\.(router|auxiliary|depth)\.")
"""Names of what has no counterpart in a smaller model."""

GROUP = re.compile(r"\.groups\.\w+")
VOCABULARY = re.compile(r"(^|\.)(embedding|head)\.weight$")


class NotUpcyclable(ValueError):
    """Weights that no rule takes into the model; the message names them."""


@torch.no_grad()
def upcycle(found: Mapping[str, Tensor], model: nn.Module) -> None:
    """Fill a model from weights of a smaller one, in place.

    Args:
        found: weights by name, as `state_dict` of the smaller model gives them.
        model: with parameters in memory; what is new keeps the values that it has.

    Raises:
        NotUpcyclable: a parameter of either has no counterpart, or one that does not fit.
    """
    used: set[str] = set()
    problems = []
    for name, target in model.state_dict().items():
        source = next((candidate for candidate in counterparts(name) if candidate in found), None)
        if source is None:
            if not FRESH.search(name):
                problems.append(f"  without a counterpart: {name} {tuple(target.shape)}")
            continue
        used.add(source)
        group = _group(model, name)
        values = enlarged(found[source].to(target.device, target.dtype), target, name, group)
        if values is None:
            problems.append(f"  {name} {tuple(target.shape)} does not come from {source} {tuple(found[source].shape)}")
            continue
        was_gated = f"{source.rsplit('.', 2)[0]}.router.weight" in found
        gains_gate = group is not None and group.router is not None and not was_gated
        target.copy_(2 * values if gains_gate and _writes_back(name, group) else values)
    problems += [f"  without use: {name}" for name in found.keys() - used]
    if problems:
        raise NotUpcyclable("\n".join(sorted(problems)[:12]))


def counterparts(name: str) -> Iterator[str]:
    """Names that a parameter can have in a smaller model, the nearest first."""
    yield name
    yield GROUP.sub(f".groups.{ALL}", name)
    if ".feed_forward.groups." in name and name.endswith(".norm.weight"):  # the norm behind every expert
        yield re.sub(r"\.feed_forward(\.groups\.\w+)\.norm", r".feed_forward_norm\1", name)
        yield re.sub(r"\.feed_forward\.groups\.\w+\.norm", ".feed_forward_norm", name)
    yield GROUP.sub("", name)


def enlarged(source: Tensor, target: Tensor, name: str, group: ExpertGroup | None) -> Tensor | None:
    """The values of a target from its source, or None if they do not fit.

    Args:
        group: the group of experts that the target is a part of.
    """
    if source.shape == target.shape:
        return source
    if source.shape[1:] != target.shape[1:]:
        return None
    if VOCABULARY.search(name) and len(target) > len(source):
        new = target[len(source) :]  # drawn already; around the mean, so that new ids are neither likely nor far away
        return torch.cat([source, source.mean(0) + new])
    if group is not None and len(source) * group.experts == len(target):
        return source.repeat(group.experts, 1)
    return None


def _group(model: nn.Module, name: str) -> ExpertGroup | None:
    """The group of experts that a parameter belongs to."""
    path = name.split(".")
    modules = (model.get_submodule(".".join(path[:length])) for length in range(len(path) - 1, 0, -1))
    return next((module for module in modules if isinstance(module, ExpertGroup)), None)


def _writes_back(name: str, group: ExpertGroup | None) -> bool:
    """Whether it is the last part of an expert before its gate."""
    last = "down" if group is None or isinstance(group.norm, nn.Identity) else "norm"
    return name.endswith(f".{last}.weight")


def upcycled(smaller: Decoder, larger: Decoder) -> Decoder:
    """`larger` with the weights of `smaller`.

    Raises:
        NotUpcyclable: as `upcycle`.
    """
    upcycle(smaller.state_dict(), larger)
    return larger
