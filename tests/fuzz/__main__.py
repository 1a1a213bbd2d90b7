"""Run cases in this process: ``python -m tests.fuzz KIND SEED …``; with ``-``, those that come as lines on stdin."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.workers import run_case, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "-"])
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--keep", type=Path, help="write the input into this folder and leave it there")
    options = parser.parse_args()
    if options.kind == "-":
        lines = [line.split() for line in sys.stdin.read().splitlines()]
        serve([(kind, int(seed)) for kind, seed in lines])
        return
    failed = 0
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            verdict = run_case(options.kind, seed, options.keep or Path(folder))
        failed += verdict.error is not None
        print(f"{options.kind} {seed}: {verdict.seconds:.2f} s, {verdict.megabytes:.0f} MB, {verdict.error or 'sound'}")
    sys.exit(bool(failed))


main()
