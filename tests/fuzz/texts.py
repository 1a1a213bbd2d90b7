"""Mutated suites, cards and recipes."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import yaml

from mm import cli
from mm.evaluate.suite import SuiteError, read_suite
from tests.fuzz import mutate
from tests.fuzz.commands import command
from tests.shard_files import jpeg
from tests.small_world import FORMS, write_recipe, write_source, write_tokenizer


def write_tsv(draw: random.Random, folder: Path) -> None:
    columns = ["index", "image", "question", "A", "B", "C", "D", "answer", "hint", "category", "l2-category", "split"]
    rows = [
        [
            str(n),
            base64.b64encode(jpeg(8 + n, 9)).decode(),
            f"What {n}?",
            "cat",
            "dog",
            "hat",
            "mat",
            "ABCD"[n % 4],
            "",
            "animals",
            "things",
            "dev",
        ]
        for n in range(4)
    ]
    changed = [columns, *rows]
    for _ in range(draw.choice((1, 1, 2, 4))):
        row = draw.choice(changed)
        pick = draw.randrange(6)
        if pick < 3 and row:
            row[draw.randrange(len(row))] = str(mutate.value(draw))
        elif pick == 3 and row:
            del row[draw.randrange(len(row))]
        elif pick == 4 and row:
            row.insert(draw.randrange(len(row)), draw.choice(row))
        else:
            changed.insert(draw.randrange(len(changed) + 1), list(draw.choice(changed)))
    text = draw.choice(("\n", "\r\n", "\n", "\r")).join("\t".join(row) for row in changed)
    data = text.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    if draw.random() < 0.4:
        data = mutate.bytes_of(draw, data, draw.choice((1, 5)), ends=300)
    (folder / "a.tsv").write_bytes(data)
    if draw.random() < 0.3:
        settings = {"score": "sum", "prompt": "{question}", "seed": 3, "made": {"by": "a test"}}
        (folder / "a.suite.yaml").write_text(_as_yaml(draw, mutate.tree(draw, settings)), encoding="utf-8")


def use_tsv(draw: random.Random, folder: Path) -> None:
    try:
        suite = read_suite(folder / "a.tsv")
        assert suite.fingerprint
        assert [question.letter_prompt for question in suite.questions]
    except SuiteError:
        return
    except Exception as error:
        if not cli._speaks_for_itself(error):
            raise


# ----------------------------------------------------------------------------------------------------- cards, recipes


def _as_yaml(draw: random.Random, tree: Any) -> str:
    """The tree in YAML, at times with aliases, tags, repeated keys, a BOM, or changed bytes."""
    try:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw.random() < 0.5)
    except (RecursionError, UnicodeEncodeError):
        text = json.dumps(tree)
    text = text.encode("utf-8", "replace").decode()
    pick = draw.randrange(12)
    if pick == 0:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
        text = bomb + text
    elif pick == 1:
        text = text.replace(
            ": ", f": {draw.choice(('!!python/object/apply:os.getcwd ', '!!binary ', '!x ', '&a '))}", 1
        )
    elif pick == 2:
        text += text
    elif pick == 3:
        text = "\ufeff" + text
    elif pick == 4:
        text = mutate.bytes_of(draw, text.encode(), 3).decode("utf-8", "replace")
    elif pick == 5:
        text += "more: " + "[" * draw.choice((100, 3000)) + "\n"
    elif pick == 6:
        text += "more: " + "{a: " * draw.choice((100, 3000)) + "\n"
    return text


def write_mutated_card(draw: random.Random, folder: Path) -> None:
    source = draw.choice(list(FORMS))
    path = write_source(folder, source, rows=2, shards=1)
    card = yaml.safe_load(path.read_text())
    path.unlink()
    card |= {"key": "txt"} if draw.random() < 0.2 else {}
    mutated = mutate.tree(draw, card, draw.choice((1, 1, 2, 4)))
    (folder / "card.yaml").write_text(_as_yaml(draw, mutated), encoding="utf-8")


def use_mutated_card(draw: random.Random, folder: Path) -> None:
    card = str(folder / "card.yaml")
    command("index", card, "--folder", str(folder / "index"))
    command("data", "check", card, "--processes", "0")


def write_mutated_recipe(draw: random.Random, folder: Path) -> None:
    """A recipe on captions and text, with one encoder, mutated."""
    world = folder.parent / "world"
    if not world.exists():
        (world / "tokenizer").mkdir(parents=True)
        write_tokenizer(world / "tokenizer")
        for source in ("pairs", "text"):
            write_source(world, source, rows=8)
    cards = {"pairs": world / "pairs.yaml", "text": world / "text.yaml", "held_out": world / "text.yaml"}
    path = write_recipe(folder, cards, world / "tokenizer", sources=("pairs", "text"))
    recipe = yaml.safe_load(path.read_text())
    del recipe["model"]["encoders"]["speech"], recipe["model"]["encoders"]["point"]
    mutated = mutate.tree(draw, recipe, draw.choice((1, 1, 2, 3)))
    path.write_text(_as_yaml(draw, mutated), encoding="utf-8")


def use_mutated_recipe(draw: random.Random, folder: Path) -> None:
    recipe = str(folder / "recipe.yaml")
    command("plan", recipe)
    if draw.random() < 0.3:
        command("estimate", recipe, "--gpus", "2")
