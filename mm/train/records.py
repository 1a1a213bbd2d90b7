"""What a run writes beside its checkpoints, so that one can tell afterwards what it did.

RUN/recipe.yaml, versions.json    what was asked for, and by what it was computed
RUN/metrics.jsonl, tensorboard/   figures, see `mm.train.meter`
RUN/pictures/step-N.png             what validation shows of an autoencoder
RUN/seen/rank-N.jsonl             which samples each step trained on
RUN/ledger.jsonl                  what went wrong, see `mm.train.ledger`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch import Tensor

from mm import configure
from mm.packing.batch import Batch
from mm.train.checkpoint import Position
from mm.train.meter import JsonLines, Progress, TensorBoard, Writer
from mm.train.parallel import World
from mm.train.recipe import Recipe
from mm.train.trackers import Trackio, WandB
from mm.train.versions import versions


class Outputs:
    """All writers of the first process; nothing on the others."""

    def __init__(self, outputs: list[Writer], terminal: Progress | None, pictures: Path | None) -> None:
        self._outputs, self._terminal, self._pictures = outputs, terminal, pictures

    def advance(self) -> None:
        if self._terminal:
            self._terminal.advance()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for output in self._outputs:
            output.write(step, figures)

    def show(self, step: int, picture: Tensor | None) -> None:
        """Keep a (rows, columns, 3) uint8 picture of a step, if there is one."""
        if self._pictures is None or picture is None:
            return
        self._pictures.mkdir(exist_ok=True)
        Image.fromarray(picture.cpu().numpy()).save(self._pictures / f"step-{step:08d}.png")


@contextmanager
def writers(recipe: Recipe, world: World, position: Position, total: int) -> Iterator[Outputs]:
    """Console, ``metrics.jsonl`` and what `log_to` names; resolved recipe and versions are written beside them."""
    if not world.is_first:
        yield Outputs([], None, None)
        return
    folder = recipe.folder
    (folder / "recipe.yaml").write_text(configure.to_yaml(recipe), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
    first = position.step + 1
    terminal = Progress(total, position.step)
    outputs: list[Writer] = [terminal, JsonLines(folder / "metrics.jsonl", first)]
    opened = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", first),
        "wandb": lambda: WandB(recipe),
        "trackio": lambda: Trackio(recipe),
    }
    outputs += [opened[name]() for name in recipe.log_to]
    try:
        yield Outputs(outputs, terminal, folder / "pictures")
    finally:
        for output in outputs:
            output.close()


class Seen:
    """What every step trained on: ``seen/rank-0.jsonl`` …, a line a step with a digest of the samples of each pack.

    Sorted over all ranks, the digests of a step do not depend on how many processes there were: two runs saw the same
    where they are equal. A resumed run has each step once.

    Args:
        writes: whether to name the packs. Of processes that share their streams one does.
    """

    def __init__(self, folder: Path, world: World, first_step: int, *, writes: bool) -> None:
        folder.mkdir(exist_ok=True)
        if world.is_first:  # files of ranks that a smaller world no longer has
            for path in folder.glob("rank-*.jsonl"):
                if int(path.stem.removeprefix("rank-")) >= world.size:
                    JsonLines(path, first_step).close()
        self._lines = JsonLines(folder / f"rank-{world.rank}.jsonl", first_step)
        self._writes = writes

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        digests = [digest for batch in batches for digest in batch.digests()] if self._writes else []
        self._lines.write(step, {"packs": digests})
