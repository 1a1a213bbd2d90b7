"""A build replaces the earlier one whole or not at all, whatever ends it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm import cli
from mm.data.card import Card
from mm.data.sources.staging import STAGE, staged
from mm.data.sources.writer import BuildError, Member, write_card, write_shards
from tests.shard_files import jpeg, pairs, write_tar
from tests.shard_files import write_card as card_of

SPLITS = ("train", "validation")
CARD = {"name": "words", "licence": "CC0", "origin": "written by a test", "sample": [{"text": "txt"}]}


def write_build(out: Path, word: str, samples: int) -> None:
    """A dataset whose samples all say one word, one a shard."""
    with staged(out, SPLITS) as stage:
        write_shards([Member(str(n), {"txt": word}) for n in range(samples)], stage, "train", 1)
        write_card(stage / "card.yaml", CARD | {"splits": ["train"], "description": word})


def words(out: Path) -> list[str]:
    """What the samples of a dataset say, after the word that its card says they do."""
    card = Card.load(out / "card.yaml")
    found = [one.record for shard in card.shards("train") for one in card.open(shard).scan()]
    return [card.description, *(record.fields["txt"].decode() for record in found if record)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def half_a_shard(stage: Path, error: BaseException) -> None:
    (stage / "train-0000.tar").write_bytes(b"half")
    raise error


def photos(folder: Path, number: int = 3) -> Path:
    folder.mkdir()
    for name, data in pairs(number):
        (folder / name).write_bytes(data)
    return folder


# ----------------------------------------------------------------------------------------------------------- swapping


def test_a_smaller_build_leaves_no_shard_of_the_one_before(tmp_path: Path) -> None:
    write_build(tmp_path, "old", 3)
    (tmp_path / "train-12345.tar").write_bytes(b"the shard of a build of more than ten thousand")
    (tmp_path / "validation-0000.tar").write_bytes(b"of a build with another share")
    write_build(tmp_path, "new", 2)
    assert words(tmp_path) == ["new"] * 3
    assert set(contents(tmp_path)) == {"card.yaml", "train-0000.tar", "train-0001.tar"}


def test_files_that_no_build_wrote_stay(tmp_path: Path) -> None:
    mine = ("notes.txt", "mine.yaml", "train-extra.tar", "training-0000.tar", "train-0000.tar.bak", "train-0000.jsonl")
    for name in mine:
        (tmp_path / name).write_text(name)
    write_build(tmp_path, "new", 1)
    assert {name: (tmp_path / name).read_text() for name in mine} == dict(zip(mine, mine, strict=True))


def test_the_earlier_build_is_whole_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write_build(tmp_path, "old", 3)
    with staged(tmp_path, SPLITS) as stage:
        write_shards([Member("0", {"txt": "new"})], stage, "train", 1)
        assert words(tmp_path) == ["old"] * 4
        write_card(stage / "card.yaml", CARD | {"splits": ["train"], "description": "new"})
        assert words(tmp_path) == ["old"] * 4
    assert words(tmp_path) == ["new"] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_build_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write_build(tmp_path, "old", 2)
    before = contents(tmp_path)
    with pytest.raises(type(error)), staged(tmp_path, SPLITS) as stage:
        half_a_shard(stage, error)
    assert contents(tmp_path) == before


def test_a_first_build_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BuildError), staged(tmp_path / "out", SPLITS):
        raise BuildError
    assert not (tmp_path / "out").exists()


def test_a_card_that_could_not_be_read_is_not_published(tmp_path: Path) -> None:
    write_build(tmp_path, "old", 1)
    with pytest.raises(ValueError, match="licence"), staged(tmp_path, SPLITS) as stage:
        write_card(stage / "card.yaml", CARD | {"licence": "", "splits": ["train"]})
    assert words(tmp_path) == ["old"] * 2


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    with staged(tmp_path, SPLITS) as stage:
        with pytest.raises(BuildError, match="another build"), staged(tmp_path, SPLITS):
            pass
        assert stage.is_dir()


# ------------------------------------------------------------------------------------------------------------- kills


def killed(work: Callable[[], None], renames: int | None = None) -> bool:
    """Whether a process that did the work was killed: by itself, or before its so-many-th renaming of a file."""
    child = os.fork()
    if child == 0:
        left = renames

        def kill(event: str, _: object) -> None:
            nonlocal left
            if event == "os.rename" and left is not None:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_build_that_is_killed_leaves_the_earlier_one_and_the_next_removes_its_rest(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path, SPLITS) as stage:
            write_shards([Member("0", {"txt": "new"})], stage, "train", 1)
            os.kill(os.getpid(), signal.SIGKILL)

    write_build(tmp_path, "old", 2)
    before = contents(tmp_path)
    assert killed(work)
    assert (tmp_path / STAGE / "new" / "train-0000.tar").exists()
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    write_build(tmp_path, "next", 1)
    assert set(contents(tmp_path)) == {"card.yaml", "train-0000.tar"}


def test_a_kill_at_any_moment_of_the_change_never_mixes_two_builds(tmp_path: Path) -> None:
    seen = set()
    for renames in range(100):
        out = tmp_path / str(renames)
        write_build(out, "old", 3)
        if not killed(lambda out=out: write_build(out, "new", 2), renames):
            break
        if (out / "card.yaml").exists():  # what a reader sees at once
            assert words(out) in (["old"] * 4, ["new"] * 3)
        with pytest.raises(BuildError), staged(out, SPLITS):  # what it sees after the next build, which fails
            raise BuildError
        assert words(out) in (["old"] * 4, ["new"] * 3)
        assert not (out / STAGE).exists()
        seen.add(words(out)[0])
    assert renames == 8  # four files of the earlier build, the change itself, three of the new one
    assert seen == {"old", "new"}


# ------------------------------------------------------------------------------------------------- memory and disks


@contextmanager
def limited(kind: int, size: int) -> Iterator[None]:
    """No file, or all memory, of this process may be larger than so many bytes."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str]:
    """Exit status and last line of a command."""
    monkeypatch.setattr(sys, "argv", ["mm", *map(str, command)])
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as a command does for the rest of its process
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_that_may_not_grow_stops_a_build_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "out", photos(tmp_path / "photos", 20)
    write_build(out, "old", 2)
    before = contents(out)
    with limited(resource.RLIMIT_FSIZE, 8192):
        status, said = sentence(monkeypatch, capsys, "data", "build", "image-folder", out, f"source={source}")
    assert status == 1
    assert said.startswith(f"Stopped mm data build image-folder: File too large: {out}")
    assert "ulimit -f" in said
    assert contents(out) == before


def test_a_full_disk_stops_a_build_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "disk" / "out", photos(tmp_path / "photos", 40)
    out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out.parent)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system of 64 kB")
    try:
        write_build(out, "old", 1)
        before = contents(out)
        status, said = sentence(monkeypatch, capsys, "data", "build", "image-folder", out, f"source={source}")
        assert (status, contents(out)) == (1, before)
        assert said.startswith(f"Stopped mm data build image-folder: No space left on device: {out}. Free some space")
    finally:
        subprocess.run(["umount", str(out.parent)], check=True)


def test_what_cannot_be_written_stops_an_index_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "0.tar", pairs(50))
    card, folder = card_of(tmp_path, "0.tar"), tmp_path / "index"
    with limited(resource.RLIMIT_FSIZE, 1024):
        status, said = sentence(monkeypatch, capsys, "index", card, "--folder", folder)
    assert status == 1
    assert said.startswith(f"Stopped mm index: File too large: {folder}")
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        status, said = sentence(monkeypatch, capsys, "index", card, "--folder", folder)
        assert status == 1
        assert str(folder) in said


def test_a_folder_that_cannot_be_made_stops_a_build_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = photos(tmp_path / "photos"), tmp_path / "file"
    file.write_text("in the way")
    for out in (file, file / "below"):
        status, said = sentence(monkeypatch, capsys, "data", "build", "image-folder", out, f"source={source}")
        assert status == 1
        assert str(out) in said
    assert file.read_text() == "in the way"


def test_a_list_that_memory_does_not_hold_stops_a_build_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "chats.json"
    with source.open("wb") as file:
        file.write(b"[")
        file.truncate(64 * 1024**3)  # takes up no space
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, now + 2 * 1024**3):
        command = ("data", "build", "llava-json", tmp_path / "out", f"source={source}", f"images={tmp_path}")
        status, said = sentence(monkeypatch, capsys, *command)
    assert status == 1
    assert said.startswith("Stopped mm data build llava-json: not enough memory. A list in a .json file is read whole")
    assert not (tmp_path / "out").exists()


def test_mistakes_in_options_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = photos(tmp_path / "photos")
    (source / "one.jpg").write_bytes(jpeg())
    for option in ("samples_per_shard=0", "validation=2", "validation=nan", "follow_links=maybe", "size=1"):
        command = ("data", "build", "image-folder", tmp_path / "out", f"source={source}", option)
        status, said = sentence(monkeypatch, capsys, *command)
        assert (status, said.partition(" ")[0]) == (2, "BuildError")
        assert option.partition("=")[0] in said
    assert not (tmp_path / "out").exists()
