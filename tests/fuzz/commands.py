"""Commands run on an input in this process, as a user would run them."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

from mm import cli, media
from mm.data.card import Card
from mm.data.index import index_card
from mm.sample import BrokenSample


class Unprintable(AssertionError):
    """Control characters of the data in what a command printed."""


def command(*arguments: str) -> None:
    """Run ``mm`` in this process with its output held to UTF-8, and free of control characters."""
    before = sys.argv, sys.stdout, sys.stderr
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding="utf-8", errors="strict", newline="\n", write_through=True)
    sys.argv, sys.stdout, sys.stderr = ["mm", *arguments], output, output
    try:
        cli.main()
    except SystemExit as end:
        if end.code not in (None, 0, 1, 2):
            raise AssertionError(f"mm {arguments[0]} ended with {end.code!r}") from end
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    printed = written.getvalue().decode()
    if escapes := sorted({letter for letter in printed if letter in "\x00\x07\x08\x1b\x9b\r\u202e"}):
        raise Unprintable(f"mm {arguments[0]} printed {escapes!r}: {printed[:2000]!r}")


def use_card(draw: random.Random, folder: Path) -> None:
    """What is done with a card and its shards: index, read every row as training does, and look."""
    card = str(folder / "card.yaml")
    command("index", card, "--folder", str(folder / "index"))
    try:
        index = index_card(Card.load(card), "train", folder / "index", progress=False)
    except Exception as error:
        if not cli._speaks_for_itself(error):
            raise
        return
    index.summary()
    for row in range(index.rows):
        for choice in range(len(index.card.choices)):
            try:
                for part in index.sample(row, choice).media:
                    media.decode(part)
            except BrokenSample:
                continue
    pick = draw.randrange(4)
    if pick == 0 and index.rows:
        command("data", "show", card, "0", "--folder", str(folder / "index"))
    elif pick == 1:
        command("data", "check", card, "--processes", "0")
    elif pick == 2:
        command("doctor", *Card.load(card).shards("train"), "--seconds", "5")
