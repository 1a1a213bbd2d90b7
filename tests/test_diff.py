"""`mm diff`: what differs between two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from mm.cli import app
from mm.train.diff import DiffError, diff, flattened, parting
from tests.small_world import losses, train_here

STEPS = ("steps=4", "validate_every=2")


@pytest.fixture(scope="module")
def first(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(recipe, f"run={tmp_path_factory.mktemp('first') / 'one'}", *STEPS)


@pytest.fixture(scope="module")
def other(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another learning rate, a larger pack and fewer steps."""
    changes = ("optim.lr=3e-3", "packing.capacity=160", "steps=3", "validate_every=0")
    return train_here(recipe, f"run={tmp_path_factory.mktemp('other') / 'two'}", *changes)


@pytest.fixture
def copy(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "copy")
    return tmp_path / "copy"


def rows(one: Path, two: Path) -> dict[str, dict[str, list[str]]]:
    """Tables by the first words of their titles: first cell of each row to its other cells."""
    found = {}
    for table in diff(one, two):
        assert isinstance(table, Table)
        names, *others = (list(map(str, column.cells)) for column in table.columns)
        title = str(table.title).partition(":")[0].partition(",")[0]
        found[title] = {name: [column[row] for column in others] for row, name in enumerate(names)}
    return found


def test_a_run_and_itself_do_not_differ(first: Path) -> None:
    found = rows(first, first)
    for title in ("recipe", "versions", "plans and data"):
        assert all(row.startswith("no difference in") for row in found[title])
    assert [cells[0] for cells in found["losses"].values()] == ["nowhere", "nowhere"]


def test_every_key_that_differs_is_told_with_both_values_and_no_other(first: Path, other: Path) -> None:
    found = rows(first, other)
    assert found["recipe"] == {
        "run": [str(first), str(other)],
        "steps": ["4", "3"],
        "optim.lr": ["0.002", "0.003"],
        "packing.capacity": ["128", "160"],
        "validate_every": ["2", "0"],
    }
    plans = found["plans and data"]
    assert plans["plan: packing.capacity"] == ["128", "160"]
    fingerprints = [json.loads((run / "plan" / "plan.json").read_text())["fingerprint"] for run in (first, other)]
    assert plans["plan: fingerprint"] == fingerprints
    assert not any("rows" in key for key in plans)


def test_length_and_last_figures_stand_side_by_side(first: Path, other: Path) -> None:
    found = rows(first, other)["figures"]
    assert found["steps"] == ["4", "3", "0.75"]
    assert found["last checkpoint"] == ["4", "3", ""]
    values = losses(first)[4], losses(other)[3]
    assert found["loss, last"] == [*(f"{value:.6g}" for value in values), f"{values[1] / values[0]:.4g}"]
    assert "validation_loss, last" in found
    assert "tokens_per_second, mean" in found


def test_the_first_step_at_which_losses_differ_is_found_by_a_bit_and_beyond_rounding(first: Path, copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] *= 1 + 1e-12
    lines[2]["loss"] *= 1 + 9e-4
    lines[3]["loss"] *= 1 + 2e-3
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_a_bit, beyond = rows(first, copy)["losses"].values()
    assert by_a_bit == ["2", repr(losses(first)[2]), repr(lines[1]["loss"])]
    assert beyond == ["4", repr(losses(first)[4]), repr(lines[3]["loss"])]


def test_curves_part_where_only_one_of_them_is_finite_and_only_at_steps_of_both() -> None:
    assert parting({1: 1.0, 2: 2.0, 4: 3.0}, {2: 2.0, 3: 9.0, 4: None}, 0.1) == 4
    assert parting({1: None, 2: 0.0}, {1: None, 2: 0.0}, 0.0) is None
    assert parting({1: 1.0}, {2: 2.0}, 0.0) is None


def test_values_are_named_by_dotted_keys_with_empty_ones_among_them() -> None:
    nested = {"a": {"b": [1, {"c": None}]}, "d": {}, "e": []}
    assert flattened(nested) == {"a.b.0": 1, "a.b.1.c": None, "d": {}, "e": []}


def test_versions_and_data_that_differ_are_told(first: Path, copy: Path) -> None:
    versions = json.loads((copy / "versions.json").read_text())
    (copy / "versions.json").write_text(json.dumps({**versions, "torch": "1.0", "extra": "2"}))
    plan = json.loads((copy / "plan" / "plan.json").read_text())
    plan["parts"]["pairs.rows"] = 23
    (copy / "plan" / "plan.json").write_text(json.dumps(plan))
    found = rows(first, copy)
    assert found["versions"] == {"torch": [versions["torch"], "1.0"], "extra": ["–", "2"]}
    assert found["plans and data"] == {"plan: pairs.rows": ["24", "23"]}


def test_a_run_that_has_not_reported_or_was_killed_while_it_wrote_can_be_compared(first: Path, copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert rows(first, copy)["figures"]["steps"] == ["4", "4", "1"]
    (copy / "metrics.jsonl").unlink()
    found = rows(first, copy)
    assert found["figures"]["steps"] == ["4", "–", ""]
    assert [cells[0] for cells in found["losses"].values()] == ["nowhere", "nowhere"]


def test_folders_that_are_no_runs_and_damaged_files_are_named(first: Path, copy: Path, tmp_path: Path) -> None:
    for folder, reason in (
        (tmp_path / "nothing", "is no folder"),
        (first / "recipe.yaml", "is no folder"),
        (first / "plan", "holds no recipe.yaml"),
        (tmp_path, f"is {copy} meant"),
    ):
        with pytest.raises(DiffError, match=reason):
            list(diff(first, folder))
    (copy / "metrics.jsonl").write_text('{"step": 1}\n[1]\n')
    with pytest.raises(DiffError, match=r"metrics\.jsonl, line 2 is no JSON object"):
        list(diff(first, copy))
    (copy / "plan" / "plan.json").write_text("{")
    with pytest.raises(DiffError, match=r"plan\.json cannot be read"):
        list(diff(first, copy))
    (copy / "recipe.yaml").write_text("a: [")
    with pytest.raises(DiffError, match=r"recipe\.yaml cannot be read"):
        list(diff(first, copy))
    (copy / "versions.json").unlink()
    with pytest.raises(DiffError, match="has not begun, or it is an export"):
        list(diff(first, copy))


def test_the_command_prints_the_tables_and_succeeds(first: Path, other: Path) -> None:
    result = CliRunner().invoke(app, ["diff", str(first), str(other)])
    assert result.exit_code == 0, result.output
    assert "optim.lr" in result.output
    failed = CliRunner().invoke(app, ["diff", str(first), "nowhere"])
    assert isinstance(failed.exception, DiffError)
