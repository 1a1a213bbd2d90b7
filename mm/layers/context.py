"""Context parallelism: one stream over several devices, when a pack is too long for one.

    device r of c: tokens r·T/c … (r + 1)·T/c ─▶ embedding, norms, projections, feed-forward, loss: as they are
    attention:     (T/c, H, d) ─all-to-all─▶ (T, H/c, d) ─attend─▶ (T, H/c, d) ─all-to-all─▶ (T/c, H, d)

Between the exchanges a device holds a part of the heads, and these see the whole stream: documents stay apart by the
same layout and the same backends as on one device, and every device has the same work (Jacobs et al. 2023,
DeepSpeed-Ulysses, section 3). Ring attention (Liu et al. 2023) needs no heads to divide, but each of its steps sees a
rectangle of the mask, and with many short documents most rectangles are empty: devices would wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd

from mm.layers.attention import attend
from mm.layers.layout import Layout


@dataclass(frozen=True)
class Context:
    """The `size` devices that hold a stream together, in the order of their parts."""

    size: int
    group: ProcessGroup

    @torch.compiler.disable(reason="attention is not compiled, see mm.layers.attention.attend")
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
        """`mm.layers.attention.attend` over the whole stream, from and to the tokens of this device.

        Args:
            q: (T/c, H, d) queries; c divides H.
            k, v: (T/c, K, d); c divides K or K divides c, and then each head goes to c/K devices.
            layout: the documents of the T tokens.

        Returns:
            (T/c, H, d).
        """
        copies = max(self.size // k.shape[1], 1)
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        return self._to_tokens(attend(q, k, v, layout, backend))

    def _to_heads(self, x: Tensor) -> Tensor:
        """(T/c, H, d) → (T, H/c, d)."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchange(parts).flatten(0, 1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(T, H/c, d) → (T/c, H, d)."""
        parts = x.unflatten(0, (self.size, -1))
        return self._exchange(parts).movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """(c, …): part i goes to device i, and what comes from device j is part j."""
        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)


def check_heads(size: int, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless so many devices can share the heads of attention."""
    if heads % size or (kv_heads % size and size % kv_heads):
        able = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ValueError(
            f"{size} devices cannot share {heads} query and {kv_heads} key heads evenly; "
            f"{', '.join(map(str, able))} can"
        )
