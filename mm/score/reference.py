"""How predictable each word of a caption is without its picture: a column of a language model's log-probabilities.

    recipe ─┬─ fold 0: train on all samples of the other folds ─▶ model 0 ─▶ scores fold 0 ─┐
            ├─ fold 1: …                                         ─▶ model 1 ─▶ scores fold 1 ┴─▶ column `reference`
            └─ …

PRIOR (arXiv 2505.08971) trains a reference on the captions that it then scores. A model that knows a caption by heart
gives its words p = 1 and so no weight, which says nothing of the picture; so the reference is cross-fitted here: each
sample is scored by a model that did not see it. Equal words are in one fold, so that no copy was seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mm import configure, terminal
from mm.configure import RecipeError
from mm.data import columns
from mm.data.columns import Row
from mm.data.index import Index, index_card
from mm.model.multimodal import MultimodalLM, build_model
from mm.packing.collate import Document, Processor
from mm.packing.weights import REFERENCE, digest, reference_fingerprint, reference_type, words_with_loss
from mm.sample import BrokenSample, Sample, Text
from mm.score.passes import Scorer
from mm.tokenizers.base import fingerprint
from mm.tokenizers.text import TextTokenizer, TokenizerOptions, WordsOnly
from mm.train import checkpoint
from mm.train.export import load_trained, recipe_of
from mm.train.loop import train
from mm.train.recipe import Recipe

logger = terminal.logger(__name__)

TOKENS = 8192
"""Of a batch that is scored at once; one document may be longer."""

SURE = 0.9
"""A probability from which on a word is counted as known, in what is told of a column."""


class _Readable(NamedTuple):
    """A row by its number among those asked for: its fold, and its document under each choice."""

    number: int
    fold: int
    documents: list[Document]


class ReferenceLM(Scorer):
    """Log-probabilities of the words that bear loss, by a language model of words alone.

    Args:
        model: a recipe of a language model, of which one is trained for each fold with ``mm train``; or a run,
            checkpoint or export, which is taken as it is.
        folds: K, from 2 on where models are trained; 1 takes the recipe's pretrained decoder as it is. A trained model
            has one.
        name: of the column, where there are to be several references.
        trained_on: the split of the card that the folds are of. Any split is scored: a sample by the model of its fold.
        device: where scoring computes, such as ``cuda``.
    """

    type = reference_type()

    def __init__(
        self,
        model: str,
        folds: int | None = None,
        name: str = REFERENCE,
        trained_on: str = "train",
        device: str = "cpu",
    ) -> None:
        self.name = name
        self._model = str(Path(model).expanduser())
        self._is_trained = Path(self._model).is_dir()
        self._folds = folds or (1 if self._is_trained else 2)
        self._trained_on, self._device = trained_on, device
        if self._folds < 1 or (self._is_trained and self._folds > 1):
            raise RecipeError(f"folds is {folds}; a recipe has 1 or more of them, and a trained model one")

    def prepare(self, index: Index, progress: bool = True) -> None:
        """Trains the models where they are not, and goes on with what was stopped.

        Raises:
            RecipeError: the recipe is none of a language model.
        """
        if self._is_trained:
            self._models = [self._model]
            self._tell_of_seen(index)
        else:
            self._models = self._fitted(index, progress)
        self._choices = len(index.card.choices)
        loaded = [_loaded(model, self._device) for model in self._models]
        identity = fingerprint([_identity(model) for _, model in loaded])
        words = loaded[0][0].text
        assert isinstance(words, WordsOnly)
        self.fingerprint = reference_fingerprint(words.beside_media, f"reference {identity}, {self._folds} folds")

    def values(self, rows: Sequence[Row]) -> list[list[dict[str, Any]] | None]:
        """For each row and choice, as `reference_type`; None for a row that cannot be read."""
        values: list[list[dict[str, Any]] | None] = [None] * len(rows)
        readable = sorted(self._readable(rows), key=lambda one: one.fold)
        for fold, group in groupby(readable, key=lambda one: one.fold):
            of_fold = list(group)
            processor, model = _loaded(self._models[fold], self._device)
            scored = log_probabilities(model, processor, [document for one in of_fold for document in one.documents])
            for one in of_fold:
                values[one.number] = [_value(document, next(scored)) for document in one.documents]
        return values

    def told(self, index: Index) -> str:
        """Words, their mean loss, and how many are known without a picture."""
        values = columns.load(index, self.name, self.fingerprint).combine_chunks()
        logs = values.flatten().field("log_probabilities").flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        return (
            f"{index.card.name}/{index.split}: {index.rows:,} samples, {len(logs):,} words at {-logs.mean():.3f} nats; "
            f"{(np.exp(logs) > SURE).mean():.1%} have p > {SURE}; {values.null_count} samples could not be read"
        )

    def _readable(self, rows: Sequence[Row]) -> Iterator[_Readable]:
        """The rows that are not broken."""
        processor, _ = _loaded(self._models[0], self._device)
        for number, row in enumerate(rows):
            try:
                samples = [row(choice) for choice in range(self._choices)]
                documents = [processor.document(sample) for sample in samples]
            except BrokenSample:
                continue
            yield _Readable(number, fold_of(self._folds, samples[0]), documents)

    def _fitted(self, index: Index, progress: bool) -> list[str]:
        """The run of each fold, trained to its end."""
        if self._folds == 1:
            return [str(self._given(index))]
        of_split = index_card(index.card, self._trained_on, index.folder, progress=progress)
        fold = functools.partial(fold_of, self._folds)
        columns.compute(of_split, _fold_column(self._folds), FOLD_RULES, fold, pa.int32(), progress=progress)
        folds = range(self._folds)
        recipes = [fold_recipe(self._model, index, self._trained_on, self._folds, number) for number in folds]
        for recipe in recipes:  # all of them first: `mm train` can be told to train one on many processes
            recipe.folder.parent.mkdir(parents=True, exist_ok=True)
            recipe.folder.with_suffix(".yaml").write_text(configure.to_yaml(recipe), encoding="utf-8")
        for recipe in recipes:
            train(recipe)
        return [str(recipe.folder) for recipe in recipes]

    def _given(self, index: Index) -> Path:
        """A file with the recipe whose pretrained decoder is taken as it is."""
        recipe = fold_recipe(self._model, index, self._trained_on, 1, 0)
        if recipe.model.decoder.pretrained is None:
            raise RecipeError(
                f"{self._model}: folds=1 takes the decoder as it is, and it has no model.decoder.pretrained; say "
                "folds=2 or more, and it is trained"
            )
        recipe.folder.parent.mkdir(parents=True, exist_ok=True)
        path = recipe.folder.with_suffix(".yaml")
        path.write_text(configure.to_yaml(recipe), encoding="utf-8")
        return path

    def _tell_of_seen(self, index: Index) -> None:
        """Warn if the model was trained on the samples that it is to score."""
        recipe = recipe_of(checkpoint.find(self._model))
        cards = {configure.find_preset(source.card).resolve() for source in recipe.data.sources.values()}
        if index.card.path.resolve() in cards:
            logger.warning(
                "%s was trained on %s: what it knows by heart has p near 1 and gets no weight. A recipe in its place "
                "is trained in folds, so that no sample is scored by a model that saw it",
                self._model,
                index.card.path,
            )


# --------------------------------------------------------------------------------------------------------------- folds

FOLD_RULES = "BLAKE2b of the words, in lower case"


def fold_of(folds: int, sample: Sample) -> int:
    """The fold of a sample in [0, folds), by its words alone: equal words, however they are spaced, are in one fold."""
    words = " ".join(part.text for part in sample.parts if isinstance(part, Text)).lower().split()
    return int.from_bytes(blake2b(" ".join(words).encode(), digest_size=8).digest(), "big") % folds


def _fold_column(folds: int) -> str:
    """Name of the column of `fold_of`."""
    return f"fold_of_{folds}"


def fold_recipe(path: str, index: Index, split: str, folds: int, fold: int) -> Recipe:
    """The recipe of a language model as it trains on the words of all folds but one, and is validated on that one.

    Raises:
        RecipeError: it has encoders, tokenizers of media or an autoencoder, or the index is not where recipes look.
    """
    if index.folder.name != "index":
        raise RecipeError(f"--folder is {index.folder}; it has to be `data.index` of a recipe with /index behind it")
    mapping = configure.resolve(path, schema=Recipe)
    model = mapping.get("model", {})
    if unwanted := [name for name in ("encoders", "tokenizers", "autoencoder") if model.get(name)]:
        raise RecipeError(f"{path}: a reference reads words alone; leave model.{unwanted[0]} out")
    source = {"card": str(index.card.path.absolute()), "split": split}
    data = mapping.get("data", {}) | {"sources": {"words": source}, "validation": {}, "index": str(index.folder.parent)}
    if folds > 1:
        column = _fold_column(folds)
        data["sources"] = {"words": source | {"where": f"{column} != {fold}"}}
        data["validation"] = {"left_out": source | {"where": f"{column} == {fold}"}}
    name = f"fold-{fold}-of-{folds}"
    recipe = configure.typed(
        Recipe,
        mapping
        | {
            "name": f"{mapping.get('name', 'reference')}-{name}",
            "run": str(Path(mapping["run"]).expanduser().absolute() / name),
            "data": data,
        },
    )
    if recipe.tokenizer is None:
        raise RecipeError(f"{path} has no `tokenizer`; take that of the recipe that the weights are for")
    return replace(recipe, tokenizer=replace(recipe.tokenizer, words_only=True))


# -------------------------------------------------------------------------------------------------------------- scoring


@functools.cache
def _loaded(model: str, device: str) -> tuple[Processor, MultimodalLM]:
    """A model of words with its processor, once a process: of a folder, or what a recipe names as pretrained."""
    if Path(model).suffix == ".yaml":
        recipe = Recipe.load(model)
        network = build_model(recipe.model).eval()
    else:
        recipe, network, _ = load_trained(model)
    assert recipe.tokenizer is not None
    config = network.decoder.config
    if config.couples and not config.is_causal:
        raise RecipeError(f"{model} chooses experts by later words too, so it gives no p(word | words before it)")
    return Processor(words_only(recipe.tokenizer), {}), network.to(device)


def _identity(model: MultimodalLM) -> str:
    """Fingerprint of the weights."""
    return fingerprint([], ((name, tensor.cpu()) for name, tensor in model.state_dict().items()))


def words_only(options: TokenizerOptions) -> WordsOnly:
    """The tokenizer without media, whatever the options say of them."""
    tokenizer = TextTokenizer.load(replace(options, words_only=True))
    assert isinstance(tokenizer, WordsOnly)
    return tokenizer


@torch.no_grad()
def log_probabilities(model: MultimodalLM, processor: Processor, documents: Sequence[Document]) -> Iterator[np.ndarray]:
    """(n,) float32 log-probability in nats of every token of a document that bears loss, document by document."""
    device = model.decoder.head_weight.device
    for batch in _batches(documents):
        collated = processor.collate([batch], [[(0, 0, 0)] * len(batch)]).to(device)
        nll = model(collated).nll.cpu().numpy()
        sizes = [int(words_with_loss(document).sum()) for document in batch]
        assert sum(sizes) == len(nll)  # all words with loss have a token before them
        yield from np.split(-nll, np.cumsum(sizes)[:-1])


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in order, as many at a time as have `TOKENS` together."""
    batch: list[Document] = []
    for document in documents:
        if batch and sum(map(len, batch)) + len(document) > TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _value(document: Document, logs: np.ndarray) -> dict[str, Any]:
    ids = document.tokens[words_with_loss(document)]
    return {"ids": digest(ids), "log_probabilities": logs.astype(np.float16)}
