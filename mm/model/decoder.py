"""The language model: a causal decoder over a flat stream (the Llama, Qwen2, Qwen3 and SmolLM families).

tokens ─embed─▶ (T, D) ─▶ [norm ─ attention ─ + ─ norm ─ feed-forward ─ +] × layers ─▶ norm ─▶ (T, D)
                                                            │ or experts by modality (`mm.model.experts`)
                             └ for some of the tokens only (`mm.model.depth`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.bounds import Count, Few, Share, Vocabulary, Width
from mm.layers.attention import attend
from mm.layers.context import Context
from mm.layers.layout import Layout
from mm.layers.noise import dropout
from mm.layers.norm import RMSNorm
from mm.layers.rope import Rope, rotate, rotation
from mm.model.depth import Depth, DepthRouter
from mm.model.experts import ALL, Experts, ModalityExperts, Untied
from mm.model.stream import Cache, Reports, Routing, Stream

QKNorm = Literal["none", "rms", "layer"]


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
    qk_norm: normalisation of every query and key head: `rms` (Qwen3) or `layer` (Chameleon)
    norm: where a block's norms stand: before its parts (`pre`), or behind them in the residual branch (`post`, as in
        Swin v2 and Chameleon 34B: Liu et al. 2021, section 3.2)
    media_attention: what a token of a picture or sound that enters through an encoder sees of its own item: what came
        before (`causal`), or all of it (`bidirectional`). Codes are predicted, so they are always causal
    dropout: share of the values that are dropped behind attention and feed-forward while training
    tied: the output head is the embedding
    experts: of every modality, in place of the feed-forward
    untied: parts with weights of their own for every group of experts: `attention`, `norms`
    depth: layers that are computed for a part of the tokens
    """

    vocabulary: Vocabulary
    width: Width
    layers: Few
    heads: Width
    kv_heads: Width
    head_dim: Width
    ffn: Width
    context: Count = 2048
    rope: Rope = field(default_factory=Rope)
    norm_eps: Share = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    norm: Literal["pre", "post"] = "pre"
    media_attention: Literal["causal", "bidirectional"] = "causal"
    dropout: Share = 0.0
    tied: bool = True
    experts: Experts | None = None
    untied: tuple[Literal["attention", "norms"], ...] = ()
    depth: Depth | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and self.mlp_bias:
            raise ValueError("experts have no biases: leave mlp_bias out")
        if self.untied and (self.experts is None or ALL in self.experts.groups):
            raise ValueError(
                "untied parts follow the groups of `experts`, one for every modality; the decoder has none"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs of values")

    @property
    def couples(self) -> bool:
        """Whether a token's output depends on other tokens of its pack than those that attention shows it."""
        return self.depth is not None or (self.experts is not None and self.experts.couples)

    @property
    def is_causal(self) -> bool:
        """Whether the decoder can be asked for its output without later tokens: it does not couple, or was taught to
        do without."""
        chooses = [self.experts] if self.experts is not None and self.experts.couples else []
        return all(options.auxiliary for options in [*chooses, *([self.depth] if self.depth else [])])


class Attention(nn.Module):
    """Self-attention with grouped queries."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim

        def projection(inputs: int, outputs: int, bias: bool) -> nn.Module:
            return untied("attention", config, lambda: Projection(inputs, outputs, bias=bias))

        self.query = projection(config.width, inner, config.qkv_bias)
        self.key = projection(config.width, kv_inner, config.qkv_bias)
        self.value = projection(config.width, kv_inner, config.qkv_bias)
        self.output = projection(inner, config.width, config.output_bias)
        self.query_norm = untied("attention", config, lambda: HEAD_NORMS[config.qk_norm](config))
        self.key_norm = untied("attention", config, lambda: HEAD_NORMS[config.qk_norm](config))

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        q, k, v = (
            projection(hidden, stream).unflatten(-1, (-1, self.head_dim))
            for projection in (self.query, self.key, self.value)
        )
        q = rotate(self.query_norm(q, stream), stream.rotation)
        k = rotate(self.key_norm(k, stream), stream.rotation)
        if stream.cache is not None:
            mixed = stream.cache.attend(self.layer, q, k, v, stream.layout)
        elif stream.context is not None:
            mixed = stream.context.attend(q, k, v, stream.layout, stream.backend)
        else:
            mixed = attend(q, k, v, stream.layout, stream.backend)
        return self.output(mixed.flatten(1), stream)


class Projection(nn.Linear):
    """A linear map, called as the other parts of a block are: ``(hidden, stream)``. The same for every token."""

    def forward(self, hidden: Tensor, stream: Stream | None = None) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm over the d values of every head, called as ``(heads, stream)`` (Chameleon, section 2.2)."""

    def forward(self, heads: Tensor, stream: Stream | None = None) -> Tensor:
        return super().forward(heads)


class NoNorm(nn.Module):
    """Hands on what it is given."""

    def forward(self, hidden: Tensor, stream: Stream | None = None) -> Tensor:
        return hidden


HEAD_NORMS: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "none": lambda config: NoNorm(),
    "rms": lambda config: RMSNorm(config.head_dim, config.norm_eps),
    "layer": lambda config: HeadLayerNorm(config.head_dim, config.norm_eps),
}
"""Norms of queries and keys, by `DecoderConfig.qk_norm`."""


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6). The same for every token, whatever the stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def untied(part: str, config: DecoderConfig, make: Callable[[], nn.Module]) -> nn.Module:
    """A part of a block, or one for every group of experts where the configuration says so."""
    if part in config.untied:
        assert config.experts is not None
        return Untied(make, list(config.experts.groups))
    return make()


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm of a block or of the decoder's end, called as ``(hidden, stream)``."""
    return untied("norms", config, lambda: RMSNorm(config.width, config.norm_eps))


def make_feed_forward(config: DecoderConfig, layer: int) -> nn.Module:
    """The feed-forward of a layer, called as ``(hidden, stream)``."""
    if config.experts is None:
        return FeedForward(config)
    norm_eps = config.norm_eps if norms_experts(config) else None
    return ModalityExperts(config.width, config.ffn, config.experts, layer, norm_eps)


def norms_experts(config: DecoderConfig) -> bool:
    """Whether the norm behind the feed-forward is computed for every expert, before its weight."""
    return config.norm == "post" and config.experts is not None and config.experts.gate == "after_norm"


class Block(nn.Module):
    """One layer. It can be for a part of the tokens, and its norms stand before its parts or behind them."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.post = config.norm == "post"
        self.dropout = config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = NoNorm() if norms_experts(config) else make_norm(config)
        self.feed_forward = make_feed_forward(config, layer)
        routes = config.depth is not None and config.depth.routes(layer)
        self.depth = DepthRouter(config.width, config.depth) if routes and config.depth else None

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        """(T, D) residual stream after this layer."""
        if self.depth is not None:
            return self.depth(hidden, stream, self._compute)
        return self._compute(hidden, stream)

    def _compute(self, hidden: Tensor, stream: Stream) -> Tensor:
        parts = ((self.attention, self.attention_norm), (self.feed_forward, self.feed_forward_norm))
        for number, (part, norm) in enumerate(parts):
            change = norm(part(hidden, stream), stream) if self.post else part(norm(hidden, stream), stream)
            if self.dropout and stream.draws:
                change = dropout(change, self.dropout, stream.layout.keys, purpose=-(2 * self.layer + number + 1))
            hidden = hidden + change
        return hidden


class NotCausal(ValueError):
    """A decoder is to go on token by token, and its output for a token depends on later ones."""

    def __init__(self, remedy: str) -> None:
        super().__init__(
            "generating and scoring need a causal decoder, and the experts or layers of this one choose among all "
            f"tokens of a pack, later ones too; {remedy}"
        )


class Decoder(nn.Module):
    """Embedding, blocks, final norm and output head. It does not know where embeddings come from.

    On the meta device it is built without memory; ``to_empty`` and `reset_parameters`, or a checkpoint, fill it.
    `attention_backend` may be set to a name in `mm.layers.attention.BACKENDS`, `context` to the devices that share each
    stream, `routing` to how tokens come to experts: as in training while training, and else by auxiliary routers where
    there are some, if it is None; and `draws` to whether noise and dropout are drawn while training.
    """

    context: Context | None = None
    routing: Routing | None = None
    draws: bool = True

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

        The projections of a block that write into the residual stream get 0.02 / √(2·layers), so that the stream's
        variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = ".attention.output" in name or name.endswith(".down")
                nn.init.normal_(module.weight, std=residual if writes_residual else 0.02, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def embed(self, tokens: Tensor) -> Tensor:
        """(T, D) embeddings of (T,) token ids."""
        return self.embedding(tokens)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        reports: Reports | None = None,
    ) -> Tensor:
        """(T, D) after the final norm; multiply by `head_weight` transposed for logits.

        Args:
            hidden: (T, D) embeddings. With a `context` T is the number of tokens that this device holds.
            positions: (T,) int64 position of every token in its document (with branches: continuing the trunk's).
            layout: the documents of the whole stream.
            cache: keeps keys and values between calls while generating; None in training.
            reports: gets what layers have to say beside.

        Raises:
            NotCausal: a cache, which brings tokens one after another, where layers choose among them.
        """
        if cache is not None:
            self.check_causal()
        stream = Stream(
            rotation=rotation(self.config.rope, positions, self.config.head_dim, hidden.dtype),
            layout=layout,
            backend=self.attention_backend,
            cache=cache,
            context=self.context,
            routing=self._routing,
            draws=self.training and self.draws,
            reports=reports if reports is not None else Reports(),
        )
        for block in self.layers:
            hidden = block(hidden, stream)
        return self.norm(hidden, stream)

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """While this lasts, tokens come to experts and layers in this way."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    @property
    def _routing(self) -> Routing:
        return self.routing or ("choice" if self.training else "auxiliary")

    def check_causal(self) -> None:
        """Raises `NotCausal` where, as tokens now come to experts and layers, they are chosen among later ones too."""
        if not self.config.couples:
            return
        if not self.config.is_causal:
            raise NotCausal("train auxiliary routers for it, as the last stage in docs/moma.md does")
        if self._routing != "auxiliary":
            raise NotCausal("its auxiliary routers can stand in: call eval(), or set `routing` to auxiliary")

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

        A multiply-add counts 2; attention counts the causal pairs only, also inside of items that see all of
        themselves; norms, RoPE, biases and routers are left out. Of what experts and layers choose, a document counts
        with its pack's share.
        """
        config, depth = self.config, self.config.depth
        attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
        experts = 1.0 if config.experts is None else config.experts.active
        weights = attention + experts * 3 * config.width * config.ffn
        shares = [depth.capacity if depth and depth.routes(layer) else 1.0 for layer in range(config.layers)]
        flops = np.zeros(np.shape(lengths))
        for share in shares:
            tokens = share * np.asarray(lengths, np.float64)
            scores = 2 * config.heads * config.head_dim * tokens * (tokens + 1) / 2
            flops += 2.0 * (tokens * weights + scores)
        return flops

    def head_flops(self, tokens: int) -> float:
        """Forward FLOPs of the output head for this many predicted tokens."""
        return 2.0 * tokens * self.config.vocabulary * self.config.width
