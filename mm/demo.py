"""The demo: the main job end to end on the embedded corpus.

pre-train an adapter ─▶ instruction-tune ─▶ export ─▶ score a suite of held-out pictures ─▶ report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mm import configure, media
from mm.data.card import Card
from mm.evaluate import CaptionedPicture, FrozenFeatures, Options, Suite, build_choice_suite, evaluate, write_suite
from mm.evaluate.model import ModelAnswerer
from mm.model.multimodal import MultimodalLM
from mm.report.packs import view_packs
from mm.report.run import Stage, run_page
from mm.sample import Image, Modality
from mm.terminal import Console, Progress, styled
from mm.train.export import export_run, load_trained
from mm.train.loop import train
from mm.train.memory import local_device
from mm.train.recipe import Recipe
from mm.train.versions import versions

CARD = "data_cards/demo/card.yaml"
PICTURES_AT_ONCE = 64
PICTURES = 440  # of the held-out ones, which come in the order of a hash
GENERATED_QUESTIONS = 60


def run_demo(folder: Path, overrides: Sequence[str], console: Console) -> Path:
    """Run the whole demo into `folder` and return its report. A demo that was stopped goes on where it was."""
    started = time.monotonic()
    pretrain, instruct = folder / "pretrain", folder / "instruct"
    recipes = [  # both are read before the first runs, so that a mistake in the second is told at once
        Recipe.load("train/demo-pretrain.yaml", [f"run={pretrain}", *overrides]),
        Recipe.load("train/demo-instruct.yaml", [f"run={instruct}", f"init_from={pretrain}", *overrides]),
    ]
    for number, recipe in enumerate(recipes, start=1):
        console.rule(f"{number} of 4: {recipe.folder.name}")
        train(recipe)
    stages = [Stage(recipe.folder.name, recipe.folder) for recipe in recipes]
    exported = export_run(stages[-1].folder, folder / "checkpoint")

    console.rule("3 of 4: evaluation on held-out pictures")
    card = Card.load(configure.find_preset(CARD))
    held_out = list(captioned_pictures(card, "heldout"))[:PICTURES]
    suite = build_choice_suite(held_out, easy_per_picture=1, hard_per_picture=2, seed=0)
    write_suite(suite, folder / "suite.tsv")
    trained = load_trained(exported)
    options = Options(
        generation_questions=GENERATED_QUESTIONS, max_tokens=8, about={"checkpoint": str(exported), **versions()}
    )
    with Progress(console=console) as progress:
        features = frozen_features(trained.model, suite, list(captioned_pictures(card, "train")), progress)
        answerer = ModelAnswerer(trained.model, trained.processor, device=local_device())
        results = evaluate(suite, answerer, options, progress, features)
    results.save(folder)
    for table in results.tables():
        console.print(table)

    console.rule("4 of 4: report")
    report = folder / "report.html"
    packs = [view for recipe in recipes for view in view_packs(recipe, step=0, shown=2)]
    report.write_text(run_page("The mm demo", stages, suite, results, packs), encoding="utf-8")
    minutes = (time.monotonic() - started) / 60
    where = f". Look at {report}; the figures are in {folder / 'results.json'}."
    console.print(styled((f"{minutes:.1f} minutes", "bold"), where))
    return report


def captioned_pictures(card: Card, split: str) -> Iterator[CaptionedPicture]:
    """The caption records of a split of the demo card, with their categories."""
    for path in card.shards(split):
        shard = card.open(path)
        for scanned in shard.scan():
            if scanned.record is None:
                raise ValueError(f"{path}: {scanned.key or 'the shard'}: {scanned.error}")
            picture = card.sample(scanned.record).media[0]
            facts = json.loads(scanned.record.fields["json"])
            yield CaptionedPicture(scanned.record.key, picture.data, facts["caption"], facts["category"], facts["head"])
        shard.close()


@torch.inference_mode()
def frozen_features(
    model: MultimodalLM, suite: Suite, train: Sequence[CaptionedPicture], progress: Progress
) -> FrozenFeatures:
    """Encoder features of the suite's and of the training pictures, averaged over the grid, for the baselines."""
    pictures = [*suite.pictures.values(), *(picture.image for picture in train)]
    encoder, transform = model.encoders[Modality.IMAGE.label], model.entrances[Modality.IMAGE].transform
    pooled = []
    for start in progress.track(range(0, len(pictures), PICTURES_AT_ONCE), description="features for the baselines"):
        chunk = pictures[start : start + PICTURES_AT_ONCE]
        inputs = transform.collate([transform.prepare(media.decode(Image(data))) for data in chunk])
        pooled.append(encoder(**inputs).view(len(chunk), -1, encoder.width).mean(1).numpy())
    features = np.concatenate(pooled)
    own = dict(zip(suite.pictures, features, strict=False))
    rest = features[len(own) :]
    return FrozenFeatures(own, rest, [picture.caption for picture in train], [picture.category for picture in train])
