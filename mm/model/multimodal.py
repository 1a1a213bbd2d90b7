"""Encoders, adapters and one decoder: from a batch to its loss.

media ─encoder─▶ features ─adapter─▶ embeddings ┐
                                                ├─▶ (T, D) ─decoder─▶ hidden ─head, at labels only─▶ Σ wℓ
tokens ───────────────embed───────▶ embeddings ─┘
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mm.configure import RecipeError, build
from mm.encoders.base import Adapter, Encoder, Grid
from mm.layers.head_loss import HeadLoss
from mm.layers.layout import WHOLE, Layout
from mm.model.autoencoder import AutoencoderOptions
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.hub import load_decoder, read_decoder_config
from mm.model.stream import Reports
from mm.model.trainable import Trainable, trains
from mm.model.upcycle import upcycled
from mm.packing.batch import IGNORE, Batch, Media
from mm.packing.collate import Entrance, Processor, Spelling
from mm.sample import Modality
from mm.tokenizers.base import MediaTokenizer
from mm.tokenizers.text import TextTokenizer
from mm.tokenizers.vocabulary import Vocabulary

PLAIN = HeadLoss()


class SlotMismatch(RuntimeError):
    """The encoder gave another number of embeddings than the plan promised.

    Writing them anyway would shift every later item onto the wrong words without any sign.
    """

    def __init__(self, modality: Modality, promised: int, given: int) -> None:
        super().__init__(
            f"the plan promised {promised} {modality.label} embeddings and the encoder with its adapter gave {given}; "
            "`grid` of its transform, `length` of its adapter and what they compute must agree"
        )


class Predicted(NamedTuple):
    """What a batch gave: the losses of its L labels, see `mm.layers.cross_entropy.Losses`, and what layers report."""

    total: Tensor
    nll: Tensor
    lse: Tensor
    reports: Reports


@dataclass
class DecoderOptions:
    """Where the language model comes from: a checkpoint, sizes to train from scratch, or both.

    pretrained: hub name, folder with safetensors, `.gguf` file, or ``package://PACKAGE/FILE``
    config: fields of `DecoderConfig`. Given beside a checkpoint they save asking the hub for its sizes while planning;
        the checkpoint must have them
    upcycle: fields of `DecoderConfig` in which the decoder differs from the checkpoint: `experts`, `untied`, `depth`, a
        larger `vocabulary`; see `mm.model.upcycle`
    attention: backend of `mm.layers.attention.attend`
    """

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    upcycle: dict[str, Any] = field(default_factory=dict)
    attention: str = "auto"

    def resolve(self) -> DecoderConfig:
        """The sizes of the decoder, without reading weights."""
        before = self.before_upcycling()
        if not self.upcycle:
            return before
        if self.pretrained is None:
            raise RecipeError("model.decoder.upcycle needs `pretrained`, the checkpoint that it starts from")
        values = {entry.name: getattr(before, entry.name) for entry in fields(DecoderConfig)}
        return build({"_target_": "mm.model.decoder.DecoderConfig", **values, **self.upcycle}, DecoderConfig)

    def before_upcycling(self) -> DecoderConfig:
        """The sizes of the checkpoint."""
        if self.config is not None:
            return build({"_target_": "mm.model.decoder.DecoderConfig", **self.config}, DecoderConfig)
        if self.pretrained is None:
            raise RecipeError("model.decoder needs `pretrained` (a checkpoint), `config` (sizes), or both")
        return read_decoder_config(self.pretrained)

    def load(self) -> Decoder:
        """The decoder of the checkpoint.

        Raises:
            RecipeError: it has other sizes than `config` says.
        """
        assert self.pretrained is not None
        promised, decoder = self.before_upcycling(), load_decoder(self.pretrained)
        for entry in fields(DecoderConfig):
            found, expected = getattr(decoder.config, entry.name), getattr(promised, entry.name)
            if found != expected:
                raise RecipeError(
                    f"model.decoder.config.{entry.name} is {expected} and {self.pretrained} has {found}; "
                    "correct the recipe, or leave `config` out to take what the checkpoint has"
                )
        return upcycled(decoder, Decoder(self.resolve())) if self.upcycle else decoder


@dataclass
class ModelOptions:
    """`model:` of a recipe.

    encoders: by modality, the continuous way in with its adapter: ``{_target_: …, adapter: {_target_: …}}``
    tokenizers: by modality, the discrete way in: ``{_target_: …}``. They are no part of the trained model, `mm data
        tokenize` writes their codes beforehand
    autoencoder: train the autoencoder of a tokenizer, and no language model
    """

    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    autoencoder: AutoencoderOptions | None = None

    def __post_init__(self) -> None:
        for name in self.encoders.keys() & self.tokenizers.keys():
            raise RecipeError(
                f"{name} has an encoder (`encoders.{name}`) and a tokenizer (`tokenizers.{name}`); a modality enters "
                "in one of the two ways, so remove one"
            )
        if self.autoencoder is not None and (self.encoders or self.tokenizers or self.decoder != DecoderOptions()):
            raise RecipeError(
                "`autoencoder` trains a tokenizer, without a language model; remove decoder, encoders and tokenizers"
            )


class MultimodalLM(Trainable):
    """A decoder that reads text tokens and, in reserved slots, what the encoders saw.

    ids: how many of the head's rows are ids of words and codes; None: all of them
    """

    def __init__(self, decoder: Decoder, encoders: dict[Modality, tuple[Encoder, Adapter]]) -> None:
        super().__init__()
        self.ids: int | None = None
        self.decoder = decoder
        self.encoders = nn.ModuleDict({modality.label: encoder for modality, (encoder, _) in encoders.items()})
        self.adapters = nn.ModuleDict({modality.label: adapter for modality, (_, adapter) in encoders.items()})

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities that enter through an encoder, in a fixed order, the same on every rank."""
        return tuple(modality for modality in Modality if modality.label in self.encoders)

    @property
    def entrances(self) -> dict[Modality, Entrance]:
        """How the modalities with an encoder enter, for the planner and the loader; see `build_processor`."""
        return {
            modality: Entrance(self._encoder(modality).transform, self._adapter(modality))
            for modality in self.modalities
        }

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of encoders and decoder, in the order in which they compute."""
        towers = [self._encoder(modality) for modality in self.modalities]
        return [block for tower in (*towers, self.decoder) for block in tower.blocks()]

    def forward(self, batch: Batch, head_loss: HeadLoss = PLAIN) -> Predicted:
        """Weighted next-token loss of a batch, summed (not averaged) over its labels, in stream order.

        Label smoothing is over the ids that there are (`ids`).
        """
        predicting = (batch.labels != IGNORE).nonzero().squeeze(1)
        reports = Reports()
        hidden = self.hidden(batch, reports=reports).index_select(0, predicting - batch.span.start)
        losses = replace(head_loss, real=self.ids)(
            hidden,
            self.decoder.head_weight,
            batch.labels.index_select(0, predicting),
            batch.weights.index_select(0, predicting),
        )
        return Predicted(*losses, reports)

    def hidden(self, batch: Batch, layout: Layout | None = None, reports: Reports | None = None) -> Tensor:
        """(T, D) last hidden states, after the final norm. Of a share of a stream, T is its tokens."""
        layout = layout or self.layout(batch)
        return self.decoder(self.embed(batch), batch.positions[batch.span], layout, reports=reports)

    def layout(self, batch: Batch) -> Layout:
        """Documents, packs and groups of a batch's stream."""
        experts = self.decoder.config.experts
        groups = batch.modality if experts is None else experts.group_of(batch.tokens.cpu(), batch.modality)
        return Layout(
            batch.offsets,
            batch.tokens.device,
            packs=batch.packs,
            groups=groups,
            seeds=batch.seeds,
            spans=self.spans(batch),
        )

    def spans(self, batch: Batch) -> Tensor | None:
        """(T,) int32 on the CPU: for every token the number of the item, from 1, that an encoder puts there, else 0.

        None where attention is causal inside items too.
        """
        if self.decoder.config.media_attention == "causal" or not batch.media:
            return None
        spans, count = torch.zeros(len(batch.tokens), dtype=torch.int32), 0
        for modality, media in batch.media.items():
            lengths = torch.tensor([self._adapter(modality).length(grid) for grid in media.grids])
            numbers = torch.arange(count + 1, count + 1 + len(lengths), dtype=torch.int32)
            spans[media.slots.cpu()] = numbers.repeat_interleave(lengths)
            count += len(lengths)
        return spans

    def embed(self, batch: Batch) -> Tensor:
        """(T, D) input of the decoder: token embeddings with the media in their slots."""
        embeddings = self.decoder.embed(batch.tokens[batch.span])
        for modality in self.modalities:
            media = batch.media.get(modality)
            if media is None:
                embeddings = embeddings + 0.0 * self._dummy(modality, embeddings.device)
            else:
                embeddings = self._place(embeddings, modality, media, batch)
        return embeddings

    def _place(self, embeddings: Tensor, modality: Modality, media: Media, batch: Batch) -> Tensor:
        features = self._encoder(modality)(**media.inputs)
        given = self._adapter(modality)(features, media.grids)
        if len(given) != len(media.slots):
            raise SlotMismatch(modality, promised=len(media.slots), given=len(given))
        slots = media.slots
        if batch.share != WHOLE:
            held = (slots >= batch.span.start) & (slots < batch.span.stop)
            slots, given = slots[held] - batch.span.start, given[held]
        return embeddings.index_copy(0, slots, given.to(embeddings.dtype))

    def _dummy(self, modality: Modality, device: torch.device) -> Tensor:
        """A finite scalar that went through the encoder, so that every rank calls it equally often."""
        encoder = self._encoder(modality)
        item, grid = encoder.transform.dummy()
        inputs = {name: tensor.to(device) for name, tensor in encoder.transform.collate([item]).items()}
        return self._adapter(modality)(encoder(**inputs), [grid]).sum()

    def trained_parts(self) -> dict[str, bool]:
        parts = {f"encoders.{name}": trains(module) for name, module in self.encoders.items()}
        parts |= {f"adapters.{name}": trains(module) for name, module in self.adapters.items()}
        return parts | {"decoder": trains(self.decoder), "head": self.decoder.head_weight.requires_grad}

    def flops(self, batch: Batch) -> dict[str, float]:
        """Forward FLOPs of the batch by part: ``encoders.image``, ``adapters.image``, …, ``decoder``, ``head``.

        Of a share of a stream, the decoder's are that share, since attention is divided by heads.
        """
        parts = {}
        for modality, media in batch.media.items():
            encoder, adapter = self._encoder(modality), self._adapter(modality)
            counts = Counter(media.grids).items()  # most items of a batch have the same few grids
            parts[f"encoders.{modality.label}"] = sum(count * encoder.flops(grid) for grid, count in counts)
            parts[f"adapters.{modality.label}"] = sum(count * adapter.flops(grid) for grid, count in counts)
        real = batch.rows[:, 0] >= 0
        parts["decoder"] = self.decoder.flops(batch.offsets.diff()[real].tolist()) / batch.share.count
        parts["head"] = self.decoder.head_flops(int((batch.labels != IGNORE).sum()))
        return parts

    def media_flops(self, modality: Modality, grid: Grid) -> float:
        """Forward FLOPs of one item in its encoder and adapter; none where it enters as codes."""
        if modality not in self.modalities:
            return 0.0
        return self._encoder(modality).flops(grid) + self._adapter(modality).flops(grid)

    def document_flops(self, lengths: np.ndarray) -> np.ndarray:
        return self.decoder.document_flops(lengths)

    def _encoder(self, modality: Modality) -> Encoder:
        encoder = self.encoders[modality.label]
        assert isinstance(encoder, Encoder)
        return encoder

    def _adapter(self, modality: Modality) -> Adapter:
        adapter = self.adapters[modality.label]
        assert isinstance(adapter, Adapter)
        return adapter


def build_model(options: ModelOptions, *, meta: bool = False) -> MultimodalLM:
    """The model of a recipe, with its pretrained parts loaded.

    Args:
        meta: build on the meta device without reading any weights, for planning and for loading a checkpoint.

    Raises:
        RecipeError: it is an autoencoder, see `mm.model.build.build_trainable`.
    """
    if options.autoencoder is not None:
        raise RecipeError(
            "a language model is needed and the recipe has `model.autoencoder`, which trains a tokenizer; "
            "docs/tokenizers.md says how one is used"
        )
    encoders = {}
    with torch.device("meta" if meta else "cpu"):
        config = options.decoder.resolve()
        decoder = Decoder(config) if meta or options.decoder.pretrained is None else options.decoder.load()
        decoder.attention_backend = options.decoder.attention
        for name, spec in options.encoders.items():
            encoders[_modality("encoders", name)] = _build_encoder(name, spec, config.width)
    if config.media_attention == "bidirectional" and not encoders:
        raise RecipeError(
            "model.decoder.config.media_attention is bidirectional and the model has no encoders, whose tokens it is "
            "for: leave it out"
        )
    return MultimodalLM(decoder, encoders)


def build_processor(options: ModelOptions, model: Trainable, text: TextTokenizer) -> Processor:
    """What turns samples into documents for a model: every modality by the way in that the recipe gives it.

    Raises:
        RecipeError: a tokenizer of another modality, or a decoder whose vocabulary does not hold all ids.
    """
    with torch.device("meta"):
        tokenizers = build_tokenizers(options)
    vocabulary = Vocabulary.of(text.vocabulary, {modality: one.codes for modality, one in tokenizers.items()})
    if isinstance(model, MultimodalLM):
        vocabulary.check_fits(model.decoder.config.vocabulary)
    spellings = {
        modality: Spelling(one.transform, vocabulary.codebooks[modality], one.fingerprint)
        for modality, one in tokenizers.items()
    }
    return Processor(text, {**model.entrances, **spellings})


def build_tokenizers(options: ModelOptions) -> dict[Modality, MediaTokenizer]:
    """The tokenizers of a recipe, by modality; with their weights, but on the meta device.

    Raises:
        RecipeError: one is of another modality than the recipe says.
    """
    return {
        _modality("tokenizers", name): _build_tokenizer(name, spec).eval() for name, spec in options.tokenizers.items()
    }


def _modality(kind: str, name: str) -> Modality:
    allowed = [modality.label for modality in Modality if modality is not Modality.TEXT]
    if name not in allowed:
        raise RecipeError(f"model.{kind}.{name}: not a modality; allowed: {', '.join(allowed)}")
    return Modality[name.upper()]


def _build_tokenizer(name: str, spec: dict[str, Any]) -> MediaTokenizer:
    tokenizer = build(spec, MediaTokenizer)
    if tokenizer.transform.modality != _modality("tokenizers", name):
        raise RecipeError(
            f"model.tokenizers.{name} is {spec.get('_target_')}, which takes {tokenizer.transform.modality.label}"
        )
    return tokenizer


def _build_encoder(name: str, spec: dict[str, Any], width: int) -> tuple[Encoder, Adapter]:
    if "adapter" not in spec:
        raise RecipeError(f"model.encoders.{name} has no `adapter`: say how its features become embeddings")
    encoder_spec = {key: value for key, value in spec.items() if key != "adapter"}
    encoder = build(encoder_spec, Encoder)
    if encoder.transform.modality != _modality("encoders", name):
        raise RecipeError(
            f"model.encoders.{name} is {spec.get('_target_')}, which takes {encoder.transform.modality.label}"
        )
    adapter = build(spec["adapter"], Adapter, features=encoder.width, width=width)
    return encoder, adapter
