"""Mutations of bytes, texts and trees of plain values. All draw from a `random.Random`, so that a seed names a case."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

TEXTS = (
    "",
    " ",
    "\x00",
    "\ufeff",
    "\ufeffA cat",
    "\u200b\u200b",
    "\u2028",
    "\x85",
    "\r",
    "\n\n",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\u202egnp.cat",
    "[/x]",
    "[bold]",
    "[/INST]",
    "[link=https://example.org]a",
    ":smile:",
    "<image>",
    "<image>\n<image>",
    "<|im_end|>",
    "</script><script>alert(1)</script>",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "pipe:cat /etc/passwd",
    "nan",
    "NULL",
    "true",
    "1e999",
    "{000..999999999}",
    "${oc.env:HOME}",
    "{{ 7 * 7 }}",
    "%s%n",
    "'\"\t,;",
    "é" * 300,
    "a" * 70_000,
    "[" * 2_000,
    "\udcff",
    "\ud800",
    "a.b.c",
)
TELLING = ("\ud800", "a\udcffb", "[/x]", "[/INST] [b", "\x1b]0;title\x07", "\x00", "\ufeff", "<image>", "a\rb")
"""Those that did harm most often."""
NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e30, 1e308)
UNUSUAL = (float("inf"), float("-inf"), float("nan"), None, True, False, [], {}, [[]], [None], {"": None})


def nested(depth: int, leaf: Any = None) -> Any:
    """A list in a list, `depth` times."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def value(draw: random.Random) -> Any:
    """A value that a reader may not expect."""
    pick = draw.randrange(10)
    if pick < 3:
        return draw.choice(TELLING)
    if pick < 5:
        return draw.choice(TEXTS)
    if pick < 7:
        return draw.choice(NUMBERS)
    if pick < 9:
        return copy.deepcopy(draw.choice(UNUSUAL))
    return nested(draw.choice((3, 50, 400)), draw.choice(TEXTS))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below the root."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def tree(draw: random.Random, root: Any, times: int = 1) -> Any:
    """A copy of plain values with nodes replaced, removed, repeated, wrapped, swapped, or their keys renamed."""
    root = copy.deepcopy(root)
    for _ in range(times):
        places = _places(root)
        if not places:
            return value(draw)
        node, key = draw.choice(places)
        pick = draw.randrange(8)
        if pick < 3:
            node[key] = value(draw)
        elif pick == 3:
            del node[key]
        elif pick == 4:
            node[key] = [node[key]] * draw.choice((1, 2, 40))
        elif pick == 5:
            other, place = draw.choice(places)
            node[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else draw.choice(other or [None]))
        elif isinstance(node, dict):
            node[draw.choice(TELLING) if pick == 6 else f"{key}{draw.choice('._ xX')}"] = node.pop(key)
        else:
            node.insert(draw.randrange(len(node) + 1), value(draw))
    return root


_INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def _flip(draw: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << draw.randrange(8)


def _set(draw: random.Random, data: bytearray, at: int) -> None:
    data[at] = draw.choice((0, 1, 0x20, 0x30, 0x37, 0x7F, 0x80, 0xFF, draw.randrange(256)))


def _integer(draw: random.Random, data: bytearray, at: int) -> None:
    size = draw.choice((2, 4, 8))
    number = draw.choice(_INTEGERS) & (256**size - 1)
    data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))


def _remove(draw: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + draw.choice((1, 2, 4, 17, 512))]


def _repeat(draw: random.Random, data: bytearray, at: int) -> None:
    block = data[at : at + draw.choice((1, 4, 32, 512))]
    data[at:at] = block * draw.choice((1, 3, 50))


def _cut(draw: random.Random, data: bytearray, at: int) -> None:
    del data[at:]


def _insert(draw: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = draw.choice(TEXTS).encode("utf-8", "surrogatepass")


_BYTES: tuple[Callable[[random.Random, bytearray, int], None], ...] = (
    *(_flip, _flip, _set, _set, _integer, _integer),
    *(_remove, _repeat, _cut, _insert),
)


def bytes_of(draw: random.Random, data: bytes, times: int = 1, ends: int = 0) -> bytes:
    """The bytes with some places changed.

    Args:
        ends: half of the changes are in that many bytes at the beginning and at the end, where headers are.
    """
    changed = bytearray(data)
    for _ in range(times):
        if not changed:
            break
        at = draw.randrange(len(changed))
        if ends and draw.random() < 0.5:
            at %= min(ends, len(changed))
            at = at if draw.random() < 0.6 else len(changed) - 1 - at
        draw.choice(_BYTES)(draw, changed, at)
    return bytes(changed)
