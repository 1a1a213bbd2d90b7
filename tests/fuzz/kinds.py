"""The kinds of input: for each, how a mutated one is written and what a user would run on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.commands import use_card
from tests.fuzz.media import use_media, write_media
from tests.fuzz.shards import write_jsonl, write_parquet, write_tar
from tests.fuzz.texts import (
    use_mutated_card,
    use_mutated_recipe,
    use_tsv,
    write_mutated_card,
    write_mutated_recipe,
    write_tsv,
)


class Kind(NamedTuple):
    """One kind of input.

    write: writes a mutated input into an empty folder
    use: runs on that folder what a user would; raises only where the suite did not say what is wrong
    """

    write: Callable[[random.Random, Path], None]
    use: Callable[[random.Random, Path], None]


KINDS: dict[str, Kind] = {
    "tar": Kind(write_tar, use_card),
    "parquet": Kind(write_parquet, use_card),
    "jsonl": Kind(write_jsonl, use_card),
    "media": Kind(write_media, use_media),
    "tsv": Kind(write_tsv, use_tsv),
    "card": Kind(write_mutated_card, use_mutated_card),
    "recipe": Kind(write_mutated_recipe, use_mutated_recipe),
}
