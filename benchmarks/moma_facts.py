"""What a model that was trained on scenes says of held-out pictures and draws of held-out captions, fact by fact.

    picture ─▶ said ─read─▶ facts ─┬─ of the picture      caption ─▶ drawn ─ colour of the border ─┬─ of the caption
                                   └─ of another one                                               └─ of another one

Captions of scenes can be read back into facts (docs/scenes.md). The background of a drawing is the named colour that is
nearest to the median of its border. The same against the facts of another sample is the control.

    python -m benchmarks.moma_facts runs/demo-moma/moma-cpu --samples 200
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from mm.data.sources.scenes import DEMO
from mm.data.sources.scenes.compose import BACKGROUNDS, Scene
from mm.data.sources.scenes.language import NoCaption, read
from mm.data.sources.scenes.pieces import read_pieces
from mm.evaluate.answerer import Prompt
from mm.evaluate.model import ModelAnswerer
from mm.media import ImageFacts, decode
from mm.model.images import generate_images
from mm.model.multimodal import build_tokenizers
from mm.model.sampling import Sampling
from mm.report.samples import GUIDANCE, WORDS, held_out
from mm.train.export import load_trained

AT_ONCE = 20

FACTS = ("background", "number of pieces", "a piece named", "its place too", "a colour of a piece")


def background_of(picture: Tensor) -> str:
    """The name of the colour around a (rows, columns, 3) picture."""
    edge = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).float()
    median = edge.median(0).values
    distances = {name: float((median - torch.tensor(colour)).norm()) for name, colour in BACKGROUNDS.items()}
    return min(distances, key=lambda name: distances[name])


def agreement(said: Scene | None, true: Scene) -> tuple[float, ...]:
    """By `FACTS`, the share of what is said that is so; nothing where it is no caption."""
    if said is None:
        return (0.0,) * len(FACTS)

    def shared(of_said: Sequence[Any], of_true: Sequence[Any]) -> float:
        """Matches, over what is there on either side at most."""
        common = sum((Counter(of_said) & Counter(of_true)).values())
        return common / max(len(of_said), len(of_true), 1)

    return (
        float(said.background == true.background),
        float(len(said.pieces) == len(true.pieces)),
        shared([one.piece for one in said.pieces], [one.piece for one in true.pieces]),
        shared([(one.piece, one.place) for one in said.pieces], [(one.piece, one.place) for one in true.pieces]),
        shared([one.colour for one in said.pieces], [one.colour for one in true.pieces]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()

    plurals = {name: row.plural for name, row in read_pieces(DEMO / "pieces.tsv").items()}
    trained = load_trained(options.run)
    tokenizers = build_tokenizers(trained.recipe.model)
    answerer = ModelAnswerer(trained.model, trained.processor, tokenizers)

    def facts(text: str) -> Scene | None:
        try:
            return read(text, plurals)
        except NoCaption:
            return None

    asked = list(islice(held_out(trained.recipe), options.samples))
    true = [read(caption, plurals) for _, caption in asked]
    other = true[1:] + true[:1]
    said, drawn, own = [], [], []
    for first in track(range(0, len(asked), AT_ONCE), "describing and drawing"):
        part = asked[first : first + AT_ONCE]
        said += [facts(text) for text in answerer.generate([Prompt(image.data, "") for image, _ in part], WORDS)]
        pictures = generate_images(
            trained.model,
            trained.processor,
            tokenizers,
            [caption for _, caption in part],
            guidance=GUIDANCE,
            sampling=Sampling(1.0, seed=trained.recipe.seed + first),
            size=ImageFacts(64, 64),
        )
        drawn += [background_of(picture) for picture in pictures]
        own += [background_of(torch.from_numpy(np.array(decode(image)))) for image, _ in part]

    captions = sum(scene is not None for scene in said) / len(said)
    print(f"{len(asked)} held-out samples; {captions:.0%} of what was said are captions of the language\n")
    print("| fact | of the sample | of another one |\n|---|---|---|")
    found = [np.mean([agreement(a, b) for a, b in zip(said, of, strict=True)], 0) for of in (true, other)]
    for fact, its, control in zip(FACTS, *found, strict=True):
        print(f"| said: {fact} | {its:.1%} | {control:.1%} |")
    for name, colours in (("drawn: background", drawn), ("the picture itself: background", own)):
        its, control = (np.mean([a == b.background for a, b in zip(colours, of, strict=True)]) for of in (true, other))
        print(f"| {name} | {its:.1%} | {control:.1%} |")


if __name__ == "__main__":
    main()
