"""Planning at the size of web corpora: windows stream, memory stays where the columns need it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PLANNING = """
import json, re, sys, time
from pathlib import Path
import numpy as np
from benchmarks.lengths import mixed_lengths
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.source import Rows, Source

rows, folder = int(sys.argv[1]), sys.argv[2]
# not ru_maxrss, which a process inherits from the one that starts it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
PER_SHARD = 10_000
some = mixed_lengths(10 * PER_SHARD)
of_some = Rows(
    shards=np.full(10, PER_SHARD),
    tokens=some.tokens.astype(np.int32)[:, None],
    counts=np.column_stack([some.images, 0 * some.images, 0 * some.images]).astype(np.int8),
    media_flops=some.image_tokens.astype(np.float64),
)
load = lambda shards: of_some.of_shards([shard % 10 for shard in shards])
source = Source("web", rows // PER_SHARD, load, np.ones(1), "made up", np.full(rows // PER_SHARD, PER_SHARD))
before = peak()
begun = time.monotonic()
plan = Plan.open(folder, [source], PackingOptions(capacity=4096, limits={"image": 16}), seed=0, epochs=1)
plan.ensure(1)
first = time.monotonic() - begun
packs = plan.total_packs()
found = plan.statistics()
print(json.dumps({
    "before": before, "peak": peak(), "first_window": first, "seconds": time.monotonic() - begun, "packs": packs,
    "samples": found.samples, "fill": found.fill,
}))
"""


def planned(rows: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", PLANNING, str(rows), str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_planning_a_million_samples_takes_little_memory_beside_the_columns(tmp_path: Path) -> None:
    found = planned(1_000_000, tmp_path)
    assert found["samples"] == 1_000_000
    assert found["peak"] - found["before"] < 150 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_million_samples_are_planned_in_two_gigabytes(tmp_path: Path) -> None:
    found = planned(100_000_000, tmp_path)
    print(found)
    assert found["samples"] == 100_000_000
    assert found["peak"] < 2e9
    assert found["fill"] > 0.98


LOADING = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from mm.packing.materialise import MicroStep
from mm.train.dataset import open_data
from mm.train.sources import Blueprint
from mm.train.recipe import Recipe

torch.set_num_threads(1)
recipe = Recipe.load("train/demo-pretrain.yaml")
data = open_data(recipe, Blueprint.of(recipe), recipe.data.sources, Path(sys.argv[1]), epochs=30)
data.plan.total_packs()
loader = DataLoader(
    data.materialiser(), sampler=[MicroStep(0, (n,)) for n in range(data.plan.planned)], batch_size=None, num_workers=1
)
def resident(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
batches = iter(loader)
(worker,) = [process.pid for process in batches._workers]
samples, marks = 0, []
for batch in batches:
    samples += int((batch.rows[:, 0] >= 0).sum())
    if samples >= 5000 * (len(marks) + 1):
        marks.append((resident("self"), resident(worker)))
print(json.dumps({"samples": samples, "marks": marks}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_fifty_thousand_samples(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADING, str(tmp_path / "plan")]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(found)
    assert found["samples"] >= 50_000
    for process in zip(*found["marks"][1:], strict=True):  # the first 5,000 fill caches
        assert max(process) < 1.05 * min(process)
