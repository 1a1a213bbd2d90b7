"""Modules that a recipe names: which are imported, and which wait for the user to allow them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import mm
from mm.allow import VARIABLE, AllowError, allow, allow_file, allowed, import_allowed, is_available
from mm.configure import RecipeError, build
from mm.encoders.base import Encoder
from tests.shard_files import write_tar

ROOT = Path(mm.__file__).parent.parent
OWN = "open('it-ran', 'w').close()\nfrom mm.encoders.vision import TimmEncoder\nclass Tower(TimmEncoder): pass\n"
TOWER = ("_target_", "own_tower.Tower"), ("name", "test_vit"), ("pretrained", False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules of somebody, of a user who allows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_tower.py").write_text(OWN)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "inner.py").write_text("")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def ran(folder: Path) -> bool:
    return (folder / "it-ran").exists()


@pytest.mark.parametrize("on_path", [False, True], ids=["not on the path", "on the path"])
def test_a_module_in_the_working_directory_is_not_run_by_a_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_path: bool
) -> None:
    if on_path:
        monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(RecipeError) as caught:
        build(dict(TOWER), Encoder)
    said = ("own_tower.Tower", str(folder / "own_tower.py"), "--allow own_tower", "MM_ALLOW=own_tower", "home/mm/allow")
    assert [words for words in said if words not in str(caught.value)] == []
    assert not ran(folder)
    assert "own_tower" not in sys.modules


def test_an_allowed_module_is_a_component(folder: Path) -> None:
    allow(["own_tower"])
    assert type(build(dict(TOWER), Encoder)).__name__ == "Tower"
    assert ran(folder)


def test_a_command_refuses_a_component_and_builds_it_with_allow(folder: Path, recipe: Path) -> None:
    def estimate(*options: str) -> subprocess.CompletedProcess[str]:
        change = "model.encoders.image={_target_: own_tower.Tower, name: test_vit, pretrained: false, image_size: 96, "
        change += "adapter: {_target_: mm.encoders.adapters.MLP}}"
        command = [sys.executable, "-m", "mm", "estimate", str(recipe), "packing.batch=8", change, *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = estimate()
    assert (refused.returncode, ran(folder)) == (2, False)
    assert "add `--allow own_tower` to the command" in refused.stderr
    assert "Traceback" not in refused.stderr
    accepted = estimate("--allow", "own_tower")
    assert (accepted.returncode, ran(folder)) == (0, True), accepted.stderr


def test_a_spawned_process_inherits_what_is_allowed(folder: Path) -> None:
    allow(["own_tower"])
    code = "from mm.allow import import_allowed; print(import_allowed('own_tower').__name__)"
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "own_tower"


@pytest.mark.parametrize("command", [["bin/installed.py"], ["-m", "mm"]], ids=["mm", "python -m mm"])
def test_a_command_and_its_workers_run_no_file_that_is_named_like_a_library(folder: Path, command: list[str]) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "installed.py").write_text("from mm.cli import main\nif __name__ == '__main__':\n    main()\n")
    (folder / "card.yaml").write_text(
        "{name: own, licence: CC0-1.0, origin: here, format: webdataset, splits: {train: {shards: ['{0..1}.tar']}},\n"
        "sample: [text: txt]}"
    )
    for number in range(2):
        write_tar(folder / f"{number}.tar", [("0.txt", b"a cat")])
    for library in ("yaml", "torch", "selectors", "socket"):
        (folder / f"{library}.py").write_text("open('it-ran', 'w').close()\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command, "index", "card.yaml", "--processes", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, ran(folder)) == (0, False), done.stderr


@pytest.mark.parametrize("name", ["own_package", "own_package.inner"])
def test_a_name_allows_what_is_inside_it_and_what_importing_it_needs(folder: Path, name: str) -> None:
    allow([name])
    assert import_allowed("own_package") is not None
    assert import_allowed("own_package.inner") is not None
    with pytest.raises(AllowError, match="module own_tower is not installed"):
        import_allowed("own_tower")


def test_the_users_file_allows_one_module_a_line(folder: Path) -> None:
    allow_file().parent.mkdir(parents=True)
    allow_file().write_text("# mine\nown_package  # towers\n\nown_tower\n")
    assert allowed() == ["own_package", "own_tower"]
    assert import_allowed("own_tower") is not None


def test_no_file_of_the_working_directory_allows_anything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("allow", "mm/allow", ".config/mm/allow", "conf/mm/allow"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("own_tower\n")
    for home in ("", ".", "conf", ".config"):
        monkeypatch.setenv("XDG_CONFIG_HOME", home)
        assert allow_file().is_relative_to(Path.home())
        with pytest.raises(AllowError):
            import_allowed("own_tower")


@pytest.mark.parametrize("name", ["own-tower", "./own_tower", "own_tower.py/", "own..tower"])
def test_what_is_no_name_of_a_module_is_an_error(folder: Path, name: str) -> None:
    with pytest.raises(AllowError, match="--allow: expected names of modules"):
        allow([name])


@pytest.mark.parametrize("target", ["antigravity.Tower", "idlelib.idle.Tower", "os.path.join"])
def test_a_module_of_python_itself_is_refused_without_being_imported(target: str) -> None:
    before = set(sys.modules)
    with pytest.raises(RecipeError, match="no module of Python's own library is"):
        build({"_target_": target}, Encoder)
    assert set(sys.modules) - before == set()


def test_an_optional_package_that_lies_in_the_working_directory_is_not_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_available("own_tower")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(AllowError, match="module own_tower is not installed"):
        is_available("own_tower")
    assert is_available("torch")


# Installed packages


def installed(folder: Path) -> tuple[Path, Path]:
    """A virtual environment's interpreter and its folder of packages."""
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    return folder / "venv" / "bin" / "python", packages


def imported(python: Path, module: str, *path: Path) -> str:
    code = f"from mm.allow import import_allowed; print(import_allowed({module!r}).__file__)"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, *path]))
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr.splitlines()[-1]).strip()


def declare(packages: Path, project: Path, names: str | None) -> None:
    """What ``pip install -e`` leaves: a description of the distribution, and the project on the path."""
    about = packages / "own_towers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-towers\nVersion: 1.0\n")
    (about / "direct_url.json").write_text(json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}))
    if names is not None:
        (about / "top_level.txt").write_text(names)
    (packages / "own_towers.pth").write_text(f"{project}\n")


def test_an_installed_module_is_imported(folder: Path) -> None:
    python, packages = installed(folder)
    (packages / "own_installed.py").write_text("")
    assert imported(python, "own_installed") == str(packages / "own_installed.py")


def test_a_folder_that_joins_the_name_of_an_installed_package_is_refused(folder: Path) -> None:
    python, packages = installed(folder)
    for place in (packages, folder / "work"):
        (place / "own_space").mkdir(parents=True)
        (place / "own_space" / "tower.py").write_text("")
    assert imported(python, "own_space") == "None"
    assert f"it lies in {folder}/work/own_space and {packages}" in imported(python, "own_space", folder / "work")


def test_a_package_that_an_installer_linked_into_place_is_installed(folder: Path) -> None:
    python, packages = installed(folder)
    (packages / "own_linked").symlink_to(folder / "own_package")
    assert imported(python, "own_linked") == str(packages / "own_linked" / "__init__.py")


@pytest.mark.parametrize("names", ["own_towers\n", None], ids=["by name", "by the distribution's name"])
def test_an_editable_package_is_installed_if_its_distribution_declares_it(folder: Path, names: str | None) -> None:
    python, packages = installed(folder)
    project = folder / "project"
    (project / "own_towers").mkdir(parents=True)
    (project / "own_towers" / "__init__.py").write_text("")
    (project / "own_scratch.py").write_text("")
    declare(packages, project, names)
    assert imported(python, "own_towers") == str(project / "own_towers" / "__init__.py")
    assert "module own_scratch is not installed" in imported(python, "own_scratch")


def test_a_description_of_a_package_in_the_working_directory_installs_nothing(folder: Path) -> None:
    python, packages = installed(folder)
    declare(folder, folder, "own_tower")
    (packages / "somewhere.pth").write_text(f"{folder}\n")
    assert "module own_tower is not installed" in imported(python, "own_tower")


def test_a_file_that_takes_the_name_of_an_editable_package_is_not_installed(folder: Path) -> None:
    python, packages = installed(folder)
    (folder / "project").mkdir()
    declare(packages, folder / "project", "own_tower")
    assert "module own_tower is not installed" in imported(python, "own_tower")
