"""`mm checkpoint …`: what is listed is there, what is found sound can be read, what is exported is the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from typer.testing import CliRunner

from mm.cli import app
from mm.train import checkpoint
from mm.train.checkpoint import CheckpointError
from mm.train.inventory import verify
from mm.train.reading import Reader
from tests.small_world import tiny_model, train_here, train_together
from tests.test_saving import contents

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages of two steps, each saved."""
    folder = tmp_path_factory.mktemp("listed")
    text = recipe.read_text().replace("steps: 10\n", "stages: [{steps: 2}, {steps: 2}]\n")
    (folder / "recipe.yaml").write_text(text)
    return train_here(folder / "recipe.yaml", f"run={folder / 'run'}", "save_every=1")


@pytest.fixture
def saved(run: Path, tmp_path: Path) -> Path:
    """Its last checkpoint, to spoil."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run/checkpoints/step-00000004"


def invoke(*arguments: object) -> tuple[int, str]:
    """Exit status and output of a command."""
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# --------------------------------------------------------------------------------------------------------------- list


def test_checkpoints_are_listed_with_step_stage_and_size(saved: Path) -> None:
    half = saved.with_name(".step-00000005.partial")
    shutil.copytree(saved, half)
    code, output = invoke("ls", saved.parents[1])
    assert code == 0
    rows = re.findall(r"│ +(\d+) +│ +(\d?) *│ +([\d.]+ MB) +│ [\d-]{10} [\d:]{8} +│ +([\w, ]+?) +│", output)
    size = f"{sum(file.stat().st_size for file in saved.iterdir()) / 1e6:.1f} MB"
    assert [row[:2] for row in rows] == [("1", "0"), ("2", "0"), ("3", "1"), ("4", "1"), ("5", "")]
    assert rows[3][2] == size
    assert [row[3] for row in rows] == ["yes"] * 4 + ["no, never loaded"]


def test_a_folder_without_checkpoints_has_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        invoke("ls", tmp_path)


# ------------------------------------------------------------------------------------------------------------- verify


def test_a_sound_checkpoint_is_found_sound(saved: Path) -> None:
    code, output = invoke("verify", saved)
    assert code == 0
    count = len(Reader(saved).read_metadata().state_dict_metadata)
    assert f"sound: {count:,} entries" in " ".join(output.split())


@pytest.mark.slow
def test_a_missing_file_of_a_rank_is_named(recipe: Path, tmp_path: Path) -> None:
    train_together(tmp_path, 2, [[str(recipe), f"run={tmp_path / 'run'}", "steps=1"]])
    path = checkpoint.find(tmp_path / "run")
    assert invoke("verify", path)[0] == 0
    (path / "__1_0.distcp").unlink()
    (finding,) = verify(path).findings
    assert finding.startswith("__1_0.distcp: missing, it held what rank 1 saved, such as ")
    assert invoke("verify", path)[0] == 1
    with pytest.raises(CheckpointError, match=r"cannot be read: FileNotFoundError: .*__1_0\.distcp"):
        checkpoint.load_weights(path, tiny_model())


def test_a_short_file_is_found_by_its_size(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    (finding,) = verify(saved).findings
    assert re.match(r"__0_0.distcp: [\d,]+ bytes of at least [\d,]+; rank 0 saved it", finding)


def test_an_entry_that_cannot_be_read_is_named_alone(saved: Path) -> None:
    places = Reader(saved).read_metadata().storage_data
    name, place = next((index.fqn, place) for index, place in places.items() if index.fqn.endswith("norm.weight"))
    with (saved / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.length))
    (finding,) = verify(saved).findings
    assert finding.startswith(f"{name}: ")


def test_values_that_are_not_finite_are_counted(saved: Path) -> None:
    state = contents(saved)
    state["model.decoder.norm.weight"][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    dcp.save(state, checkpoint_id=saved, no_dist=True)
    findings = verify(saved).findings
    assert findings == ("model.decoder.norm.weight: 3 of 32 values are not finite",)


def test_parameters_that_are_not_those_of_the_recipe_are_named(saved: Path) -> None:
    recipe = saved.parents[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ffn: 64", "ffn: 96"))
    (finding,) = verify(saved).findings
    assert "feed_forward.down.weight: (32, 64) in the checkpoint, (32, 96) in the model" in finding


def test_an_incomplete_checkpoint_is_refused(saved: Path) -> None:
    (saved / "position.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        invoke("verify", saved)


# ------------------------------------------------------------------------------------------------------------- export


def test_consolidating_gives_the_bytes_of_an_export(run: Path, tmp_path: Path) -> None:
    code, output = invoke("consolidate", run / "checkpoints/step-00000002", tmp_path / "two")
    assert code == 0
    assert "recipe.yaml of step 2" in output
    CliRunner().invoke(app, ["export", str(run), str(tmp_path / "export")], catch_exceptions=False)
    invoke("consolidate", run / "checkpoints/step-00000004", tmp_path / "four")
    exported = (tmp_path / "export/model.safetensors").read_bytes()
    assert (tmp_path / "four/model.safetensors").read_bytes() == exported
    assert (tmp_path / "two/model.safetensors").read_bytes() != exported


def test_a_run_folder_is_no_checkpoint_to_consolidate(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        invoke("consolidate", run, tmp_path / "out")


def test_averaging_writes_the_mean_of_the_last_checkpoints(run: Path, tmp_path: Path) -> None:
    code, output = invoke("average", run, "--last", 3, tmp_path / "out")
    assert code == 0
    assert "holds the mean of 3 checkpoints" in output
    averaged = load_file(tmp_path / "out/model.safetensors")
    states = [contents(path) for path in checkpoint.newest(run, 3)]
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            mean = torch.stack([state[f"model.{name}"].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    model = tiny_model()
    checkpoint.load_weights(tmp_path / "out", model)


def test_more_checkpoints_than_there_are_cannot_be_averaged(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has 4 checkpoints and 5 were asked for"):
        invoke("average", run, tmp_path / "out")
