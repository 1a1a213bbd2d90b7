"""Generation and scoring of continuations, for many prompts at once.

prompts (P_i, D) ──one stream──▶ prefill ─▶ cache ─▶ one token of every live sequence a step ─▶ ids
trunks (P_i, D) + options ──branches of one stream──▶ hidden where an option's tokens are predicted ─▶ log-probabilities

Both need a decoder whose output for a token does not depend on later ones (`Decoder.check_causal`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mm.layers.attention import attend, attend_cache
from mm.layers.layout import Layout
from mm.layers.precision import wide
from mm.model.decoder import Decoder
from mm.model.grammar import Grammar
from mm.model.multimodal import MultimodalLM
from mm.model.sampling import Sampling
from mm.packing.batch import Batch
from mm.tokenizers.vocabulary import Vocabulary

ROWS = 256
"""Positions whose logits exist at once while scoring."""


@dataclass(frozen=True)
class Passage:
    """Tokens as a decoder reads them.

    embeddings: (P, D), where the decoder is; in media slots what an encoder saw
    tokens: (P,) int64 ids on the CPU; the pad token in media slots
    modality: (P,) int8 on the CPU
    spans: (P,) int32 on the CPU, see `Layout.spans`; None where attention is causal
    """

    embeddings: Tensor
    tokens: Tensor
    modality: Tensor
    spans: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, decoder: Decoder, vocabulary: Vocabulary, ids: Sequence[int]) -> Self:
        """Words and codes."""
        tokens = torch.tensor(ids, dtype=torch.int64)
        return cls(decoder.embed(tokens.to(decoder.head_weight.device)), tokens, vocabulary.modality_of(tokens))

    @classmethod
    def joined(cls, parts: Sequence[Passage]) -> Self:
        """One behind the other."""
        columns = zip(*((part.embeddings, part.tokens, part.modality) for part in parts), strict=True)
        causal = all(part.spans is None for part in parts)
        spans = [
            part.modality.new_zeros(len(part), dtype=torch.int32) if part.spans is None else part.spans
            for part in parts
        ]
        return cls(*map(torch.cat, columns), spans=None if causal else torch.cat(spans))

    def layout(self, decoder: Decoder, lengths: Sequence[int], branches: Sequence[int] | None = None) -> Layout:
        """Of these tokens as documents of these lengths."""
        experts = decoder.config.experts
        groups = None if experts is None else experts.group_of(self.tokens, self.modality)
        return Layout.of(lengths, decoder.head_weight.device, branches, groups, self.spans)


def passages(model: MultimodalLM, batch: Batch) -> list[Passage]:
    """The documents of a batch."""
    lengths = batch.offsets.diff().tolist()
    columns = (model.embed(batch), batch.tokens.cpu(), batch.modality)
    spans = model.spans(batch)
    found = [Passage(*parts) for parts in zip(*(column.split(lengths) for column in columns), strict=True)]
    if spans is None:
        return found
    return [replace(passage, spans=part) for passage, part in zip(found, spans.split(lengths), strict=True)]


class KeyValueCache:
    """Keys and values of B sequences, in memory reserved once, for a decoder's `cache`.

    The first pass through the decoder brings the beginnings of all sequences as documents of one stream; every later
    pass brings one token of each. A layer that leaves tokens out brings fewer, so each layer counts its own. After a
    pass, `advance` counts the tokens that were read.
    """

    def __init__(self, decoder: Decoder, sequences: int, capacity: int) -> None:
        config, weight = decoder.config, decoder.head_weight
        shape = (config.layers, sequences, config.kv_heads, capacity, config.head_dim)
        # Zeros, not garbage: a masked value still takes part in a product, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.read = torch.zeros(sequences, dtype=torch.int64, device=weight.device)
        self.lengths = torch.zeros(config.layers, sequences, dtype=torch.int64, device=weight.device)
        self.longest = [0] * config.layers  # at most, in Python: asking the device would wait for it every step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(T, H, d) attention of the tokens of a pass, whose keys and values are kept."""
        sequences = layout.document_of_token
        places = self.lengths[layer, sequences] + layout.positions
        self.keys[layer][sequences, :, places] = k
        self.values[layer][sequences, :, places] = v
        self.lengths[layer] += layout.offsets_on_device.diff()
        begins = not self.longest[layer]
        self.longest[layer] += layout.longest
        if begins or not layout.tokens:
            return attend(q, k, v, layout)
        whole = layout.tokens == self.lengths.shape[1]
        seen = (layer, slice(None) if whole else sequences, slice(None), slice(self.longest[layer]))
        return attend_cache(q, self.keys[seen], self.values[seen], self.lengths[layer, sequences])

    def positions(self, layout: Layout) -> Tensor:
        """(T,) int64 positions of the tokens of the next pass in their documents."""
        return self.read[layout.document_of_token] + layout.positions

    def advance(self, layout: Layout) -> None:
        """Count the tokens of a finished pass."""
        self.read = self.read + layout.offsets_on_device.diff()

    def keep(self, sequences: Sequence[int]) -> None:
        """Forget all sequences but these."""
        chosen = torch.tensor(sequences, device=self.read.device)
        self.keys, self.values = self.keys[:, chosen], self.values[:, chosen]
        self.read, self.lengths = self.read[chosen], self.lengths[:, chosen]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of codes: they are taken by logits u + s · (c − u) (Ho and Salimans 2022, eq. 6).

    c are the logits behind a prompt and u those behind another beginning of the same item, which both read along.

    unconditional: for every prompt, the same without what is to be followed
    scale: s, in the paper 1 + w. 0 ignores the prompt, 1 is without guidance
    """

    unconditional: Sequence[Passage]
    scale: float

    def apply(self, logits: Tensor, guided: Sequence[bool]) -> Tensor:
        """(B, V) of (2B, V), the unconditional ones last; rows that are not guided are those of the prompt."""
        prompted, free = logits.chunk(2)
        rows = torch.tensor(guided, device=logits.device)[:, None]
        return torch.where(rows, free + self.scale * (prompted - free), prompted)


@torch.no_grad()
def generate(
    decoder: Decoder,
    grammar: Grammar,
    prompts: Sequence[Passage],
    max_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    guidance: Guidance | None = None,
) -> list[list[int]]:
    """Tokens that continue each prompt.

    A sequence's tokens do not depend on the others: greedy ones up to floating-point ties, drawn ones because each
    sequence has a random stream of its own.

    Args:
        decoder: weights in one process.
        grammar: what may follow.
        prompts: B beginnings of documents, none empty.
        max_tokens: most tokens to generate for one prompt.
        stop: ids that end a sequence; they are not part of the result.
        sampling: how tokens are taken; the most probable ones if not given.

    Raises:
        ValueError: an empty prompt; it leaves nothing to predict from.
        NotCausal: the decoder cannot go token by token.
    """
    _refuse_empty([len(prompt) for prompt in prompts], "prompt")
    produced: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_tokens <= 0:
        return produced
    draw = (sampling or Sampling()).start(len(prompts))
    allowed = grammar.allowed(decoder.config.vocabulary).to(decoder.head_weight.device)
    cursors = [grammar.cursor(prompt.tokens.tolist()) for prompt in prompts]
    streams = [*prompts, *(guidance.unconditional if guidance else ())]
    reader = _Reader(decoder, streams, max_tokens)
    live = list(range(len(prompts)))
    logits = reader.read(Passage.joined(streams), [len(stream) for stream in streams])
    while True:
        states = [cursors[sequence] for sequence in live]
        if guidance:
            logits = guidance.apply(logits, [state.in_item for state in states])
        possible = allowed[[state.state for state in states]]
        tokens = draw(logits.masked_fill(~possible, float("-inf")), live)
        going = []
        for row, (sequence, token) in enumerate(zip(live, tokens, strict=True)):
            if token not in stop:
                produced[sequence].append(token)
                cursors[sequence].read(token)
                if len(produced[sequence]) < max_tokens:
                    going.append(row)
        if not going:
            return produced
        rows = [*going, *(len(live) + row for row in going)] if guidance else going
        if len(going) < len(live):
            reader.keep(rows)
        step = [tokens[row % len(live)] for row in rows]
        live = [live[row] for row in going]
        logits = reader.read(Passage.of(decoder, grammar.vocabulary, step), [1] * len(step))


class _Reader:
    """A decoder that reads sequences further and further."""

    def __init__(self, decoder: Decoder, beginnings: Sequence[Passage], more: int) -> None:
        """
        Args:
            more: how many tokens will be read behind each beginning at most.
        """
        self.decoder = decoder
        self.cache = KeyValueCache(decoder, len(beginnings), max(map(len, beginnings)) + more)

    def read(self, passage: Passage, lengths: Sequence[int]) -> Tensor:
        """(B, V) logits of what follows, after so many further tokens of each sequence."""
        layout = passage.layout(self.decoder, lengths)
        hidden = self.decoder(passage.embeddings, self.cache.positions(layout), layout, self.cache)
        self.cache.advance(layout)
        return hidden[layout.offsets_on_device[1:] - 1] @ self.decoder.head_weight.T

    def keep(self, sequences: Sequence[int]) -> None:
        """Forget all sequences but these."""
        self.cache.keep(sequences)


class Scored(NamedTuple):
    """logprob: log-probability of a continuation in nats, summed over its tokens; tokens: how many they are."""

    logprob: float
    tokens: int


@torch.no_grad()
def score_continuations(
    decoder: Decoder,
    vocabulary: Vocabulary,
    trunks: Sequence[Passage],
    options: Sequence[Sequence[Sequence[int]]],
    tokens_per_pass: int = 4096,
) -> list[list[Scored]]:
    """Log-probability of every option after its trunk, each trunk computed once for all of its options.

    An option is a branch that sees the trunk and itself; its first token is predicted by the trunk's last position.
    The result does not depend on `tokens_per_pass`.

    Args:
        decoder: weights in one process.
        vocabulary: of words and codes.
        trunks: N beginnings of documents, none empty.
        options: for every trunk, the token ids of each of its continuations, none empty.
        tokens_per_pass: bound on T; a trunk with more options than fit is computed again for the rest. One trunk with
            one option may exceed it.

    Raises:
        ValueError: an empty trunk or option.
        NotCausal: what the decoder makes of an option depends on the others.
    """
    decoder.check_causal()
    _refuse_empty([len(trunk) for trunk in trunks], "trunk")
    _refuse_empty([len(option) for group in options for option in group], "option")
    scores: list[list[Scored]] = [[] for _ in trunks]
    for documents in _passes(trunks, options, tokens_per_pass):
        sums = iter(_score_pass(decoder, vocabulary, documents))
        for document in documents:
            scores[document.number] += [Scored(next(sums), len(option)) for option in document.options]
    return scores


@dataclass
class _Document:
    """A trunk with those of its options that one pass scores, each a branch.

    The last token of an option is predicted, never read.
    """

    number: int
    trunk: Passage
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
    trunks: Sequence[Passage], options: Sequence[Sequence[Sequence[int]]], tokens_per_pass: int
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


def _score_pass(decoder: Decoder, vocabulary: Vocabulary, documents: Sequence[_Document]) -> list[float]:
    """Log-probability of every option of the documents, in order."""
    device = decoder.head_weight.device
    lengths = [len(document) for document in documents]
    branches = [branch for document in documents for branch in document.branches]
    positions = torch.tensor([position for document in documents for position in document.positions], device=device)
    passage = Passage.joined(
        [part for document in documents for part in (document.trunk, Passage.of(decoder, vocabulary, document.tokens))]
    )
    # Causal attention alone is faster than branches.
    layout = passage.layout(decoder, lengths, branches if any(branches) else None)
    hidden = decoder(passage.embeddings, positions, layout)

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
        logits = wide(chosen @ decoder.head_weight.T)
        mine = (rows >= first) & (rows < first + ROWS)
        logits_of_targets = logits[rows[mine] - first, targets[mine]]
        found[mine.cpu()] = (logits_of_targets - logits.logsumexp(-1)[rows[mine] - first]).double().cpu()
    return found


def _refuse_empty(lengths: Sequence[int], what: str) -> None:
    if 0 in lengths:
        raise ValueError(f"{what} {lengths.index(0)} is empty; there is nothing to predict from")
