"""The command that runs the tests in settings of other processors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.elsewhere import ROOT, SETTINGS, Result, busy_cores, duplicates, read_report, table
from tests.processes import session, wait_until
from tests.small_world import environment

SUITE = """
import os, subprocess, torch, pytest

def test_of_the_setting():
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert os.environ["OMP_NUM_THREADS"] == "1"

def test_that_fails():
    raise AssertionError

@pytest.mark.skip
def test_that_is_skipped(): ...
"""


def run(folder: Path, setting: str) -> subprocess.CompletedProcess[str]:
    suite = folder / "test_suite.py"
    suite.write_text(SUITE)
    command = [sys.executable, "-m", "tests.elsewhere", "--setting", setting, "--folder", str(folder / "results")]
    command += ["--", str(suite), "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_a_setting_runs_and_its_failures_are_named(tmp_path: Path) -> None:
    done = run(tmp_path, "no-vectors")
    assert done.returncode == 1
    assert re.search(r"no-vectors +1 +1 +1 ", done.stdout), done.stdout + done.stderr
    assert re.search(r"avx512 +not run yet", done.stdout)
    assert "no-vectors: " in done.stdout
    assert "test_suite::test_that_fails" in done.stdout.splitlines()[-1]
    assert "raise AssertionError" in (tmp_path / "results" / "no-vectors.log").read_text()


def test_busy_processes_end_with_the_run() -> None:
    def children() -> list[str]:
        listing = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], stdout=subprocess.PIPE, text=True)
        return [line for line in listing.stdout.splitlines() if "os.getppid()" in line]

    def interrupted() -> None:
        with busy_cores(True):
            assert len(children()) >= 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not children()


def test_busy_processes_end_when_the_one_that_started_them_is_killed() -> None:
    script = "from tests.elsewhere import *\nwith busy_cores(True): print('started', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script]
    leader = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout is not None
    assert leader.stdout.readline() == "started\n"
    assert len(session(leader.pid)) >= 2
    leader.kill()
    leader.wait()
    wait_until(lambda: not session(leader.pid))


def test_one_thread_is_what_every_other_setting_has() -> None:
    assert duplicates(["plain", "two-threads", "one-thread", "busy"]) == {"one-thread": "plain"}


def test_a_run_that_breaks_off_is_a_failure(tmp_path: Path) -> None:
    broken = read_report(tmp_path / "busy.xml", 3, "", 1.0)
    assert broken.failures == [f"pytest ended with status 3: see {tmp_path / 'busy.log'}"]


def test_the_table_has_a_line_for_every_setting() -> None:
    lines = table({"plain": Result("", 3, 0, 0, 1.25, [])}, {"avx512": "not run: the processor lacks it"}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SETTINGS)
    assert lines[1].split()[1:] == ["3", "0", "0", "1.2"]
    assert lines[4].endswith("the processor lacks it")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_one_thing(name: str) -> None:
    setting = SETTINGS[name]
    assert len(setting.environment) + setting.busy == (name != "plain")


def test_an_example_may_take_as_long_as_the_machine_needs() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
