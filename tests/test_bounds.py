"""Absurd numbers in a recipe or on the command line are a sentence with the key, the value and the range, at once."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mm import configure
from mm.bounds import Between
from mm.cli import app
from mm.configure import RecipeError
from mm.model.decoder import DecoderConfig
from mm.objectives.next_token import NextToken
from mm.objectives.reconstruction import Reconstruction
from mm.packing.options import PackingOptions
from mm.packing.plan import PlanError
from mm.train.preview import MOST_PACKS, planned, preview
from mm.train.recipe import Recipe
from tests.shard_files import write_card, write_tar
from tests.small_world import write_recipe

ABSURD = (-1, 0, 10**30, math.inf, -math.inf, math.nan, 1e308, True, 10**400)


def numbers(hint: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Keys of all numbers of a dataclass, those of dataclasses in it included."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from numbers(typing.get_args(hint)[0], keys)
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from numbers(member, keys)
    elif hint in (int, float):
        yield keys
    elif is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            yield from numbers(hints[field.name], (*keys, field.name))
    elif origin in (list, tuple, dict):
        item = "mine" if origin is dict else "0"
        yield from numbers(typing.get_args(hint)[-1], (*keys, item))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A recipe over 10 samples of a few words."""
    write_tar(tmp_path / "0.tar", [(f"{row:03d}.txt", b"some words here") for row in range(10)])
    card = write_card(tmp_path, "0.tar", [{"text": "txt"}], name="few")
    cards = {"text": card, "held_out": card}
    decoder = {"vocabulary": 259, "width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 16, "ffn": 16}
    model = {"decoder": {"config": decoder}}
    return write_recipe(tmp_path, cards, tokenizer_folder, ["text"], model=model)


def laid(mapping: Any, keys: tuple[str, ...], value: Any) -> Any:
    """The mapping with a value under some keys, where what lies between is made."""
    if not keys:
        return value
    if isinstance(mapping, list):
        items = list(mapping) or [{}]
        return [laid(items[0], keys[1:], value), *items[1:]]
    if keys[0] == "0":
        return [laid({"match": "x"}, keys[1:], value)]
    mapping = dict(mapping or {})
    name = next(iter(mapping), "mine") if keys[0] == "mine" else keys[0]
    return mapping | {name: laid(mapping.get(name), keys[1:], value)}


def test_every_number_of_a_recipe_is_accepted_or_refused_by_name(recipe: Path) -> None:
    whole = configure.dump(Recipe.load(recipe))
    accepted, refused = [], []
    paths = list(numbers(Recipe))
    assert {("packing", "capacity"), ("optim", "parts", "0", "lr"), ("data", "sources", "mine", "weight")} <= {*paths}
    for keys in paths:
        for value in ABSURD:
            try:
                configure.typed(Recipe, laid(whole, keys, value))
                accepted.append((".".join(keys), value))
            except RecipeError as error:
                refused.append((keys, value, str(error)))
    silent = [one for one in refused if one[0][-1] not in one[2] and one[0][-2] not in one[2]]
    assert silent == []
    assert max(len(said) for *_, said in refused) < 600
    assert {key for key, value in accepted if value} == {"optim.clip"}


@pytest.mark.parametrize("schema", [DecoderConfig, NextToken, Reconstruction, PackingOptions])
def test_every_number_of_a_component_has_bounds_of_its_own(schema: type) -> None:
    def bounded(hint: Any) -> bool:
        if typing.get_origin(hint) is typing.Annotated:
            return any(isinstance(one, Between) for one in typing.get_args(hint))
        return hint not in (int, float) and all(bounded(one) for one in typing.get_args(hint))

    hints = typing.get_type_hints(schema, include_extras=True)
    assert [field.name for field in fields(schema) if not bounded(hints[field.name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=1e308", r"`steps` is 1e\+308; expected a whole number from 1 to 1,000,000,000"),
        ("packing.capacity=1e30", r"`packing\.capacity` is 1e\+30; expected a whole number from 1 to 16,777,216\."),
        ("optim.lr=.nan", r"`optim\.lr` is nan; expected a number from 0 to 1000"),
        ("optim.lr=.inf", r"`optim\.lr` is inf; expected a number from 0 to 1000"),
        (f"seed={'9' * 5000}", r"a number of 5,000 digits; expected one that fits in 64 bits"),
        (f"optim.lr={'9' * 400}", r"`optim\.lr` is 9{200}…; expected a number from 0 to 1000"),
        ("model.decoder.config.layers=1e12", r"layers` is .*; expected a whole number from 1 to 1,024"),
        ("packing={batch: null, batch_tokens: 1e12, capacity: 1}", r"batch_tokens is 1,000,000,000,000, which is"),
        ("time_limit=" + "9" * 400 + "h", "time_limit is '9"),
        ("data.cache={limit: " + "9" * 400 + "GB}", "is no number of bytes"),
    ],
)
def test_what_a_refusal_says(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe, [change]).model.decoder.resolve()


def test_a_look_at_a_billion_steps_plans_some_of_them(recipe: Path) -> None:
    chosen = Recipe.load(recipe, ["steps=1000000000", "packing.policy=one-per-pack", "packing.window=2048"])
    data = planned(chosen)
    assert data.plan.planned < 2 * MOST_PACKS
    shown = [list(table.columns[0].cells) for table in preview(chosen)][-1]
    assert "planned here" in shown


def test_a_window_of_more_samples_than_memory_holds_is_refused(recipe: Path) -> None:
    with pytest.raises(PlanError, match=r"packing\.window × packing\.capacity is .* holds at most 4,194,304 samples"):
        planned(Recipe.load(recipe, ["packing.capacity=16777216", "packing.window=1024"]))


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["inspect", "RECIPE", "--step", "99999999999999999999"], "--step"),
        (["inspect", "RECIPE", "--step", "-1"], "--step"),
        (["inspect", "RECIPE", "--packs", "-1"], "--packs"),
        (["report", "RUN", "--samples", "-1"], "--samples"),
        (["eval", "RUN", "suite.tsv", "--generate", "-1"], "--generate"),
        (["doctor", "x.tar", "--capacity", "0"], "--capacity"),
        (["doctor", "x.tar", "--seconds", "nan"], "--seconds"),
        (["generate", "RUN", "--temperature", "nan"], "--temperature"),
        (["generate", "RUN", "--max-tokens", "0"], "--max-tokens"),
        (["estimate", "RECIPE", "--gpus", "0"], "--gpus"),
        (["estimate", "RECIPE", "--mfu", "inf"], "--mfu"),
        (["index", "card.yaml", "--processes", "1000000000"], "--processes"),
        (["data", "show", "card.yaml", "99999999999999999999"], "row"),
    ],
)
def test_absurd_options_are_a_sentence(recipe: Path, arguments: list[str], option: str) -> None:
    result = CliRunner().invoke(app, [str(recipe) if one == "RECIPE" else one for one in arguments])
    assert result.exit_code == 2
    assert "Invalid value" in result.output
    assert option in result.output


def test_a_step_beyond_the_end_is_a_sentence(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(recipe), "--step", "10"])
    assert isinstance(result.exception, RecipeError)
    assert str(result.exception) == "the run ends after 10 steps; there is no step 10"
