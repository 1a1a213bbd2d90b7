"""The language model: a causal decoder over a flat stream (the Llama, Qwen2, Qwen3 and SmolLM families).

tokens ─embed─▶ (T, D) ─▶ [norm ─ attention ─ + ─ norm ─ feed-forward ─ +] × layers ─▶ norm ─▶ (T, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.layers.attention import attend
from mm.layers.context import Context
from mm.layers.layout import Layout
from mm.layers.norm import RMSNorm
from mm.layers.rope import Rope, Rotation, rotate, rotation


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    vocabulary: V, rows of the embedding
    width: D
    layers: number of blocks
    heads: H query heads
    kv_heads: K key and value heads; divides H
    head_dim: d, values a head
    ffn: inner width of the feed-forward
    context: longest document that the weights were made for, in tokens; a fact for exports, not a limit
    rope: rotary frequencies
    norm_eps: added to the mean square
    qkv_bias, output_bias, mlp_bias: biases of the attention's inputs, of its output, and of the feed-forward
    qk_norm: RMS normalisation of every query and key head (Qwen3)
    tied: the output head is the embedding
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int = 2048
    rope: Rope = field(default_factory=Rope)
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs of values")


class Cache(Protocol):
    """Keys and values of earlier tokens, as attention sees them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(T, H, d) attention of new tokens, after their keys and values were kept for `layer`."""
        ...


@dataclass(frozen=True)
class Stream:
    """What attention needs to know of the flat stream, the same in every layer.

    rotation: RoPE of every token
    layout: the documents
    backend: of `mm.layers.attention.attend`
    cache: keys and values of earlier calls while generating
    context: the devices that hold the stream together, if several do
    """

    rotation: Rotation
    layout: Layout
    backend: str
    cache: Cache | None
    context: Context | None


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.output = nn.Linear(inner, config.width, bias=config.output_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)) for projection in (self.query, self.key, self.value)
        )
        q = rotate(self.query_norm(q), stream.rotation)
        k = rotate(self.key_norm(k), stream.rotation)
        if stream.cache is not None:
            mixed = stream.cache.attend(self.layer, q, k, v, stream.layout)
        elif stream.context is not None:
            mixed = stream.context.attend(q, k, v, stream.layout, stream.backend)
        else:
            mixed = attend(q, k, v, stream.layout, stream.backend)
        return self.output(mixed.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6). The same for every token, whatever the layout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm of a block or of the decoder's end, called as ``(hidden, layout)``. Another norm is chosen here."""
    return RMSNorm(config.width, config.norm_eps)


def make_feed_forward(config: DecoderConfig, layer: int) -> nn.Module:
    """The feed-forward of a layer, called as ``(hidden, layout)``. Experts and other widths are chosen here."""
    return FeedForward(config)


class Block(nn.Module):
    """One layer, with norms before its parts."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config, layer)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        """(T, D) residual stream after this layer."""
        layout = stream.layout
        hidden = hidden + self.attention(self.attention_norm(hidden, layout), stream)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden, layout), layout)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and output head. It does not know where embeddings come from.

    On the meta device it is built without memory; ``to_empty`` and `reset_parameters`, or a checkpoint, fill it.
    `attention_backend` may be set to a name in `mm.layers.attention.BACKENDS`, and `context` to the devices that share
    each stream.
    """

    context: Context | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "auto"
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights anew, the same for the same generator state: normal with deviation 0.02, biases 0, norms 1.

        The two projections of a block that write into the residual stream get 0.02 / √(2·layers), so that the stream's
        variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = name.endswith((".attention.output", ".feed_forward.down"))
                nn.init.normal_(module.weight, std=residual if writes_residual else 0.02, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()

    def embed(self, tokens: Tensor) -> Tensor:
        """(T, D) embeddings of (T,) token ids."""
        return self.embedding(tokens)

    def forward(self, hidden: Tensor, positions: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """(T, D) after the final norm; multiply by `head_weight` transposed for logits.

        Args:
            hidden: (T, D) embeddings. With a `context` T is the number of tokens that this device holds.
            positions: (T,) int64 position of every token in its document (with branches: continuing the trunk's).
            layout: the documents of the whole stream.
            cache: keeps keys and values between calls while generating; None in training.
        """
        config = self.config
        turns = rotation(config.rope, positions, config.head_dim, hidden.dtype)
        stream = Stream(turns, layout, self.attention_backend, cache, self.context)
        for block in self.layers:
            hidden = block(hidden, stream)
        return self.norm(hidden, layout)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) weight of the output head: the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the unit of sharding and of activation checkpointing."""
        return list(self.layers)

    def flops(self, lengths: Sequence[int]) -> float:
        """Forward FLOPs of documents of these lengths through blocks and norms, without the head."""
        return float(self.document_flops(np.asarray(lengths, np.int64)).sum())

    def document_flops(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) float64 forward FLOPs of documents of (n,) tokens.

        A multiply-add counts 2; attention counts the causal pairs only; norms, RoPE and biases are left out.
        """
        config = self.config
        tokens = np.asarray(lengths, np.float64)
        pairs = tokens * (tokens + 1) / 2
        attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
        weights = attention + 3 * config.width * config.ffn
        scores = 2 * config.heads * config.head_dim * pairs
        return 2.0 * config.layers * (tokens * weights + scores)

    def head_flops(self, tokens: int) -> float:
        """Forward FLOPs of the output head for this many predicted tokens."""
        return 2.0 * tokens * self.config.vocabulary * self.config.width
