"""Generation and scoring of continuations, for many prompts at once.

prompts (P_i, D) ──one stream──▶ prefill ─▶ cache ─▶ one token of every live sequence a step ─▶ ids
trunks (P_i, D) + options ──branches of one stream──▶ hidden where an option's tokens are predicted ─▶ log-probabilities
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mm.layers.attention import attend, attend_cache
from mm.layers.layout import Layout
from mm.model.decoder import Decoder

ROWS = 256
"""Positions whose logits exist at once while scoring."""


class KeyValueCache:
    """Keys and values of B sequences, in memory reserved once, for a decoder's `cache`.

    The first pass through the decoder brings all prompts as documents of one stream; every later pass brings one token
    of each sequence. After a pass, `advance` counts what it brought.
    """

    def __init__(self, decoder: Decoder, sequences: int, capacity: int) -> None:
        config, weight = decoder.config, decoder.head_weight
        shape = (config.layers, sequences, config.kv_heads, capacity, config.head_dim)
        # Zeros, not garbage: a masked value still takes part in a product, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=weight.device)
        self.longest = 0  # in Python: asking the device would wait for it every step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(T, H, d) attention of the tokens of a pass, whose keys and values are kept."""
        sequences = layout.document_of_token
        places = self.lengths[sequences] + layout.positions
        self.keys[layer][sequences, :, places] = k
        self.values[layer][sequences, :, places] = v
        if not self.longest:
            return attend(q, k, v, layout)
        seen = self.longest + 1
        return attend_cache(q, self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen], self.lengths + 1)

    def advance(self, layout: Layout) -> None:
        """Count the tokens of a finished pass."""
        self.lengths = self.lengths + layout.offsets_on_device.diff()
        self.longest += layout.longest

    def keep(self, sequences: Sequence[int]) -> None:
        """Forget all sequences but these."""
        chosen = torch.tensor(sequences, device=self.lengths.device)
        self.keys, self.values = self.keys[:, chosen], self.values[:, chosen]
        self.lengths = self.lengths[chosen]


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    max_tokens: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Tokens that continue each prompt.

    A sequence's tokens do not depend on the others: greedy ones up to floating-point ties, drawn ones because each
    sequence has a random stream of its own, a function of the seed and its number.

    Args:
        decoder: weights in one process.
        prompts: B tensors (P_i, D) of embeddings, P_i > 0.
        max_tokens: most tokens to generate for one prompt.
        stop: ids that end a sequence; they are not part of the result.
        temperature: divides the logits before drawing; 0 takes the most probable token.
        top_p: draw from the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020, section 3.1).
        seed: of the draws.

    Raises:
        ValueError: an empty prompt; it leaves nothing to predict from.
    """
    lengths = [len(prompt) for prompt in prompts]
    _refuse_empty(lengths, "prompt")
    produced: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_tokens <= 0:
        return produced
    draw = _Greedy() if temperature == 0 else _Nucleus(temperature, top_p, seed, len(prompts))
    cache = KeyValueCache(decoder, len(prompts), max(lengths) + max_tokens)
    live = list(range(len(prompts)))
    hidden, layout = torch.cat(list(prompts)), Layout.of(lengths, decoder.head_weight.device)
    while True:
        positions = cache.lengths[layout.document_of_token] + layout.positions
        last = decoder(hidden, positions, layout, cache)[layout.offsets_on_device[1:] - 1]
        cache.advance(layout)
        tokens = draw(last @ decoder.head_weight.T, live)
        going = []
        for row, (sequence, token) in enumerate(zip(live, tokens, strict=True)):
            if token not in stop:
                produced[sequence].append(token)
                if len(produced[sequence]) < max_tokens:
                    going.append(row)
        if not going:
            return produced
        if len(going) < len(live):
            cache.keep(going)
            live = [live[row] for row in going]
        hidden = decoder.embed(torch.tensor([tokens[row] for row in going], device=layout.device))
        layout = Layout.of([1] * len(going), layout.device)


class _Greedy:
    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> list[int]:
        """The most probable token of each row of (B, V)."""
        return logits.argmax(-1).tolist()


class _Nucleus:
    """Draws from the most probable tokens, with one random stream a sequence."""

    def __init__(self, temperature: float, top_p: float, seed: int, sequences: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(_hash(seed, number)) for number in range(sequences)]

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> list[int]:
        """One token for each row of (B, V); row i belongs to ``sequences[i]``."""
        probabilities, tokens = (logits.float().cpu() / self.temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        probabilities[:, 0].clamp_(min=torch.finfo(torch.float32).tiny)  # top_p = 0 leaves the most probable one
        drawn = [
            torch.multinomial(row, 1, generator=self.generators[sequence])
            for row, sequence in zip(probabilities, sequences, strict=True)
        ]
        return tokens.gather(1, torch.stack(drawn)).squeeze(1).tolist()


def _hash(seed: int, number: int) -> int:
    """A seed for one of many streams; a hash, so that neighbouring seeds do not share streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest(), "little", signed=True)


class Scored(NamedTuple):
    """logprob: log-probability of a continuation in nats, summed over its tokens; tokens: how many they are."""

    logprob: float
    tokens: int


@torch.no_grad()
def score_continuations(
    decoder: Decoder,
    trunks: Sequence[Tensor],
    options: Sequence[Sequence[Sequence[int]]],
    tokens_per_pass: int = 4096,
) -> list[list[Scored]]:
    """Log-probability of every option after its trunk, each trunk computed once for all of its options.

    An option is a branch that sees the trunk and itself; its first token is predicted by the trunk's last position.
    The result does not depend on `tokens_per_pass`.

    Args:
        decoder: weights in one process.
        trunks: N tensors (P_i, D) of embeddings, P_i > 0.
        options: for every trunk, the token ids of each of its continuations, none empty.
        tokens_per_pass: bound on T; a trunk with more options than fit is computed again for the rest. One trunk with
            one option may exceed it.

    Raises:
        ValueError: an empty trunk or option.
    """
    _refuse_empty([len(trunk) for trunk in trunks], "trunk")
    _refuse_empty([len(option) for group in options for option in group], "option")
    scores: list[list[Scored]] = [[] for _ in trunks]
    for documents in _passes(trunks, options, tokens_per_pass):
        sums = iter(_score_pass(decoder, documents))
        for document in documents:
            scores[document.number] += [Scored(next(sums), len(option)) for option in document.options]
    return scores


@dataclass
class _Document:
    """A trunk with those of its options that one pass scores, each a branch.

    The last token of an option is predicted, never read.
    """

    number: int
    trunk: Tensor
    options: list[Sequence[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trunk) + sum(len(option) - 1 for option in self.options)

    @property
    def tokens(self) -> list[int]:
        """Tokens read after the trunk."""
        return [token for option in self.options for token in option[:-1]]

    @property
    def positions(self) -> list[int]:
        """Of every token; each branch continues the trunk."""
        end = len(self.trunk)
        return [*range(end), *(end + i for option in self.options for i in range(len(option) - 1))]

    @property
    def branches(self) -> list[int]:
        """Of every token; the trunk is 0."""
        marks = (branch for branch, option in enumerate(self.options, start=1) for _ in option[:-1])
        return [0] * len(self.trunk) + list(marks)

    def predictors(self, start: int) -> list[int]:
        """Place in the stream that predicts each token of each option, for a document that begins at `start`."""
        last_of_trunk = start + len(self.trunk) - 1
        places, branch = [], last_of_trunk + 1
        for option in self.options:
            places += [last_of_trunk, *range(branch, branch + len(option) - 1)]
            branch += len(option) - 1
        return places


def _passes(
    trunks: Sequence[Tensor], options: Sequence[Sequence[Sequence[int]]], tokens_per_pass: int
) -> Iterator[list[_Document]]:
    """The documents of each pass, as many as fit, in order."""
    documents: list[_Document] = []
    used = 0
    for number, (trunk, group) in enumerate(zip(trunks, options, strict=True)):
        for option in group:
            begun = bool(documents) and documents[-1].number == number
            if documents and used + len(option) - 1 + (0 if begun else len(trunk)) > tokens_per_pass:
                yield documents
                documents, used, begun = [], 0, False
            if not begun:
                documents.append(_Document(number, trunk))
                used += len(trunk)
            documents[-1].options.append(option)
            used += len(option) - 1
    if documents:
        yield documents


def _score_pass(decoder: Decoder, documents: Sequence[_Document]) -> list[float]:
    """Log-probability of every option of the documents, in order."""
    device = decoder.head_weight.device
    lengths = [len(document) for document in documents]
    branches = [branch for document in documents for branch in document.branches]
    positions = torch.tensor([position for document in documents for position in document.positions], device=device)
    embeddings = [
        part
        for document in documents
        for part in (document.trunk, decoder.embed(torch.tensor(document.tokens, dtype=torch.int64, device=device)))
    ]
    layout = Layout.of(lengths, device, branches if any(branches) else None)  # causal attention alone is faster
    hidden = decoder(torch.cat(embeddings), positions, layout)

    starts = [0, *accumulate(lengths[:-1])]
    predictors = [
        place for document, start in zip(documents, starts, strict=True) for place in document.predictors(start)
    ]
    options = [option for document in documents for option in document.options]
    labels = [token for option in options for token in option]
    logprobs = _log_probabilities(decoder, hidden, predictors, labels)
    return [part.sum().item() for part in logprobs.split([len(option) for option in options])]


def _log_probabilities(decoder: Decoder, hidden: Tensor, predictors: list[int], labels: list[int]) -> Tensor:
    """(L,) float64 log-probability of each label, predicted by that place of the (T, D) stream."""
    places, rows = torch.tensor(predictors, device=hidden.device).unique(return_inverse=True)
    targets = torch.tensor(labels, device=hidden.device)
    found = torch.empty(len(labels), dtype=torch.float64)
    for first, chosen in zip(range(0, len(places), ROWS), hidden[places].split(ROWS), strict=True):
        logits = (chosen @ decoder.head_weight.T).float()
        mine = (rows >= first) & (rows < first + ROWS)
        logits_of_targets = logits[rows[mine] - first, targets[mine]]
        found[mine.cpu()] = (logits_of_targets - logits.logsumexp(-1)[rows[mine] - first]).double().cpu()
    return found


def _refuse_empty(lengths: Sequence[int], what: str) -> None:
    if 0 in lengths:
        raise ValueError(f"{what} {lengths.index(0)} is empty; there is nothing to predict from")
