"""The whole suite as other processors and busier machines would run it: `make test-elsewhere`.

    settings ──probe──▶ lacking | same as another | to run ──pytest──▶ FOLDER/NAME.log, NAME.xml ──▶ NAME.json ──▶ table

Vector width, the instructions of oneDNN and the number of threads change the order in which numbers are added, and so
the last bits of every result. A test that trains or compares across a choice may pass with one order only.

A finished setting is not run again for the same commit and the same arguments, so that an interrupted command resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""What torch calls the vector instructions that it uses, ascending."""


@dataclass(frozen=True)
class Setting:
    """A setting: variables of the environment, the vector instructions it `needs`, and whether other work runs."""

    environment: dict[str, str] = field(default_factory=dict)
    needs: str = "DEFAULT"
    busy: bool = False

    def whole_environment(self) -> dict[str, str]:
        """Of a process in this setting. Everything but what the setting says is as in `make test`."""
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return inherited | {"OMP_NUM_THREADS": "1"} | self.environment


SETTINGS = {
    "plain": Setting(),
    "no-vectors": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}, needs="AVX2"),
    "avx512": Setting({"ATEN_CPU_CAPABILITY": "avx512"}, needs="AVX512"),
    "onednn-avx2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}, needs="AVX2"),
    "onednn-avx512": Setting({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, needs="AVX512"),
    "one-thread": Setting({"OMP_NUM_THREADS": "1"}),
    "two-threads": Setting({"OMP_NUM_THREADS": "2"}),
    "busy": Setting(busy=True),
}
"""By name. `plain` is `make test`; every other changes one thing."""


@dataclass(frozen=True)
class Result:
    """The outcome of one run. `state` identifies what was run: the sources and the arguments."""

    state: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    failures: list[str]


# -------------------------------------------------------------------------------------------------------- the processor

PROBE = """
import torch
torch.nn.functional.conv2d(torch.zeros(16, 64, 32, 32), torch.zeros(64, 64, 3, 3))  # by oneDNN, which then names itself
print("aten:" + torch.backends.cpu.get_cpu_capability())
"""


@cache
def _probe(aten: str, onednn: str) -> tuple[str, str]:
    environment = Setting({"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}).whole_environment()
    environment = {name: value for name, value in environment.items() if value} | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    found = {key: [line.split(key)[1] for line in done.stdout.splitlines() if key in line] for key in ("aten:", "isa:")}
    return found["aten:"][0], (found["isa:"] or ["no oneDNN"])[0]


def instructions(setting: Setting) -> tuple[str, str]:
    """The instructions that torch and oneDNN use in a setting, as each calls them."""
    return _probe(*(setting.environment.get(name, "") for name in VARIABLES[:2]))


def lacking(names: Sequence[str]) -> list[str]:
    """Those of the settings that need instructions that the processor lacks."""
    if all(SETTINGS[name].needs == "DEFAULT" for name in names):
        return []
    best, _ = instructions(SETTINGS["plain"])
    # a processor of another family has names of its own and none of these instructions
    level = CAPABILITIES.index(best) if best in CAPABILITIES else 0
    return [name for name in names if CAPABILITIES.index(SETTINGS[name].needs) > level]


def duplicates(names: Sequence[str]) -> dict[str, str]:
    """By name, the earlier setting that computes in the same way on this processor."""
    first: dict[tuple[object, ...], str] = {}
    same = {}
    for name in names:
        setting = SETTINGS[name]
        way = (*instructions(setting), setting.whole_environment()["OMP_NUM_THREADS"], setting.busy)
        if first.setdefault(way, name) != name:
            same[name] = first[way]
    return same


# ------------------------------------------------------------------------------------------------------------- the runs

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10**6))"


@contextmanager
def busy_cores(busy: bool) -> Iterator[None]:
    """One busy process for each core. They also end when this process is killed: each looks for its parent."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(cores if busy else 0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(name: str, arguments: Sequence[str], folder: Path, state: str) -> Result:
    """Run pytest in a setting; its output is shown and kept."""
    began, log, report = time.monotonic(), folder / f"{name}.log", folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"]
    environment = SETTINGS[name].whole_environment()
    with busy_cores(SETTINGS[name].busy), log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    minutes = (time.monotonic() - began) / 60
    return read_report(report, status, state, minutes)


def read_report(report: Path, status: int, state: str, minutes: float) -> Result:
    """The result of a run of pytest that ended with a status and wrote a report, or none."""
    if status not in (0, 1) or not report.exists():
        return Result(state, 0, 1, 0, minutes, [f"pytest ended with status {status}: see {report.with_suffix('.log')}"])
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {outcome.tag for outcome in case}
        if outcomes & {"failure", "error"}:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return Result(state, passed, len(failures), skipped, minutes, failures)


def state_of(arguments: Sequence[str]) -> str:
    """A digest of the sources, as committed and as changed since, and of the arguments."""
    digest = hashlib.sha256(shlex.join(arguments).encode())
    for command in ("git rev-parse HEAD", "git diff HEAD"):
        digest.update(subprocess.run(command.split(), cwd=ROOT, capture_output=True, check=True).stdout)
    listing = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ the table


def kept(folder: Path, state: str) -> dict[str, Result]:
    """Results of earlier runs of the same state."""
    found = {name: folder / f"{name}.json" for name in SETTINGS}
    results = {name: Result(**json.loads(path.read_text())) for name, path in found.items() if path.exists()}
    return {name: result for name, result in results.items() if result.state == state}


def table(results: dict[str, Result], notes: dict[str, str]) -> str:
    """A line for every setting, then the names of what failed."""
    lines = [f"{'setting':<14} {'passed':>7} {'failed':>7} {'skipped':>8} {'minutes':>8}"]
    for name in SETTINGS:
        if name in notes:
            lines.append(f"{name:<14} {notes[name]}")
        elif name in results:
            one = results[name]
            lines.append(f"{name:<14} {one.passed:>7} {one.failed:>7} {one.skipped:>8} {one.minutes:>8.1f}")
        else:
            lines.append(f"{name:<14} not run yet")
    lines += [f"{name}: {failure}" for name, result in results.items() for failure in result.failures]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests in settings of other processors, one after another.")
    parser.add_argument("--setting", choices=SETTINGS, help="run only this one, again if it has been run")
    parser.add_argument("--folder", type=Path, default=ROOT / ".elsewhere", help="of logs and results")
    parser.add_argument("arguments", nargs="*", help="of pytest, behind --")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    options.folder.mkdir(exist_ok=True)
    state = state_of(options.arguments)
    results, chosen = kept(options.folder, state), [options.setting] if options.setting else list(SETTINGS)
    print("looking at what the processor can do", flush=True)
    notes = dict.fromkeys(lacking(chosen), "not run: the processor lacks it")
    if not options.setting:
        same = duplicates([name for name in chosen if name not in notes])
        notes |= {name: f"the same as {other} on this machine" for name, other in same.items()}
    todo = [name for name in chosen if name not in notes and (options.setting or name not in results)]
    for number, name in enumerate(todo, start=1):
        print(f"\n{name} ({number} of {len(todo)}), log in {options.folder / name}.log", flush=True)
        results[name] = run(name, options.arguments, options.folder, state)
        (options.folder / f"{name}.json").write_text(json.dumps(asdict(results[name]), indent=1))
    print(f"\n{table(results, notes)}")
    return int(any(result.failures for result in results.values()) or options.setting in notes)


if __name__ == "__main__":
    sys.exit(main())
