"""Modality experts against dense models of the same FLOPs a token: a sweep over arms, learning rates and seeds.

    scenes, dictionary ─▶ BPE, image tokenizer, codes ─▶ one run an (arm, rate, seed, steps) ─▶ moma.jsonl

Every run sees a stream of samples of which none comes twice: composed scenes with true captions, in both orders, and
entries of a dictionary. A run has two stages: the arm trains; then, where experts or layers choose among later tokens,
auxiliary routers learn to do it causally. What counts is the loss on held-out scenes and entries, measured causally.

    python -m benchmarks.moma prepare FOLDER     corpora, tokenizers and codes: some minutes, once
    python -m benchmarks.moma sweep FOLDER       all runs, two at a time; repeated, it goes on
    python -m benchmarks.moma_table              what came out, as a table and a plot
    python -m benchmarks.moma demo               a small version, and a model that draws: 25 CPU minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.sweeps import TIMED, cpu_seconds, read_results, slug, sweep, write_result

RESULTS = Path(__file__).with_name("moma.jsonl")

WIDTH, LAYERS, FFN = 96, 4, 256
STEPS, ROUTER_STEPS = 240, 120
TOKENS = 4096
"""Of a step."""

RATES = (3e-3, 9e-3, 3e-2)
SEEDS = (0, 1, 2)

FOUR = {"groups": {"text": 4, "image": 4}, "noise": True}

ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "1t1i": {"experts": {"groups": {"text": 1, "image": 1}}},
    "4t4i": {"experts": FOUR},
    "8 mixed": {"experts": {"groups": {"all": 8}, "noise": True}},
    # Seven layers of which four are for a quarter of the tokens cost what four whole ones do.
    "4t4i, depth": {"experts": FOUR, "depth": {"capacity": 0.25}, "layers": 7},
    "4t4i from 1t1i": {"experts": FOUR},
    "4t4i, by share": {"experts": FOUR | {"rank": "share"}},
    "4t4i, no noise": {"experts": FOUR | {"noise": False}},
    "8 mixed, no noise": {"experts": {"groups": {"all": 8}, "noise": False}},
    "4t4i, token choice": {"experts": {"groups": {"text": 4, "image": 4}, "router": "token_choice"}},
    "4+4 by hash": {"experts": {"groups": {"one": 4, "other": 4}, "by": "hash", "noise": True}},
    "dense, equal parameters": {"ffn": 8 * FFN},
}
UPCYCLED = "4t4i from 1t1i"
"""Begins with one expert a modality for a quarter of its steps."""

MAIN = ("dense", "1t1i", "4t4i", "8 mixed", "4t4i, depth", "4t4i, by share")
"""Arms with three seeds."""

LENGTHS = {"dense": (60, 120, 480, 720), "1t1i": (120, 480), "4t4i": (120, 480)}
"""Further numbers of steps, each with a schedule of its own: what a dense model needs for the loss of an arm."""

WEIGHTS = {"scenes": 0.7, "words": 0.3}
"""Of the sources in training, and of their held-out losses in what counts."""


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        return slug(self.arm, "lr", f"{self.rate:g}", "seed", self.seed, "steps", self.steps)


# ------------------------------------------------------------------------------------------------------- the corpora


def prepare(folder: Path, dictionary: Path | None) -> None:
    """Corpora, BPE, image tokenizer and codes in a folder; what is there already is not made again.

    Args:
        dictionary: Debian's dict-gcide; None takes what this Python says about itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes, words, index = folder / "scenes", folder / "words", folder / "index"
    once(scenes, "data", "build", "scenes", str(scenes), "samples=30000")
    source = ("python-docs", ()) if dictionary is None else ("gcide", (f"source={dictionary}",))
    once(words, "data", "build", source[0], str(words), *source[1])
    cards = [str(scenes / "card.yaml"), str(words / "card.yaml")]
    once(folder / "bpe", "data", "bpe", *cards, "--size", "1024", "--out", str(folder / "bpe"))
    pictures = [f"data.{part}.pictures.card={scenes / 'card.yaml'}" for part in ("sources", "validation")]
    options = [f"run={folder / 'tokenizer'}", f"data.index={index}", "steps=1000", "validate_every=250"]
    once(folder / "tokenizer-done", "train", "train/image-tokenizer-64.yaml", *pictures, *options)
    for split in ("train", "validation"):
        done = folder / f"codes-{split}-done"
        arguments = ["--with", str(write_tokenizer(folder)), "--split", split, "--folder", str(index / "index")]
        once(done, "data", "tokenize", str(scenes / "orders.yaml"), *arguments, "--processes", "2")


def once(product: Path, *arguments: str) -> None:
    """Run a command of the suite unless its product is there."""
    if product.exists():
        return
    subprocess.run([sys.executable, "-m", "mm", *arguments], check=True)
    if not product.exists():
        product.touch()


def write_tokenizer(folder: Path) -> Path:
    """The preset of the trained image tokenizer."""
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump(tokenizer(folder)))
    return path


def tokenizer(folder: Path) -> dict[str, Any]:
    return {"_target_": "mm.train.tokenizer.TrainedTokenizer.load", "weights": str(folder / "tokenizer")}


# ----------------------------------------------------------------------------------------------------------- one run


def recipe(job: Job, folder: Path, routers: int = ROUTER_STEPS) -> dict[str, Any]:
    """The recipe of a run."""
    arm = ARMS[job.arm]
    stages: list[dict[str, Any]] = [{"steps": job.steps}]
    if job.arm == UPCYCLED:
        one = {"model": {"decoder": {"config": {"experts": {"groups": {"text": 1, "image": 1}}}}}}
        first = {"steps": job.steps // 4, "schedule": {"floor": 1.0}, **one}
        stages = [first, {"steps": job.steps - job.steps // 4}]
    if couples(arm):
        causal = {"experts": {"auxiliary": True}} | ({"depth": {"auxiliary": True}} if "depth" in arm else {})
        stages.append(
            {
                "steps": routers,
                "model": {"decoder": {"config": causal}},
                "objective": {"_target_": "mm.objectives.routers.AuxiliaryRouters"},
                "optim": {"lr": 3e-3, "parts": [{"match": "auxiliary"}, {"match": ".", "freeze": True}]},
            }
        )
    scenes, words = folder / "scenes" / "orders.yaml", folder / "words" / "card.yaml"
    return {
        "name": job.name,
        "run": str(folder / "runs" / job.name),
        "seed": job.seed,
        "model": {"decoder": {"config": decoder(job.arm)}, "tokenizers": {"image": tokenizer(folder)}},
        "tokenizer": {"path": str(folder / "bpe")},
        "objective": {"_target_": "mm.objectives.next_token.NextToken", "z_loss": 1e-5},
        "data": {
            "sources": {
                "scenes": {"card": str(scenes), "weight": WEIGHTS["scenes"], "epochs": 1},
                "words": {"card": str(words), "weight": WEIGHTS["words"], "epochs": 1},
            },
            "validation": {
                "scenes": {"card": str(scenes), "split": "validation"},
                "words": {"card": str(words), "split": "validation"},
            },
            "index": str(folder / "index"),
        },
        "packing": {"capacity": 1024, "batch": TOKENS // 1024, "window": 64, "too_long": "truncate"},
        "micro_batch": TOKENS // 1024,
        "precision": "fp32",
        "optim": {"lr": job.rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"kind": "linear", "warmup": 0.1, "floor": 0.01},
        "log_every": 5,
        "log_to": [],
        "keep": 1,
        "stages": stages,
    }


def decoder(arm: str) -> dict[str, Any]:
    """The sizes of an arm's decoder."""
    return {
        "vocabulary": 1024 + 2 + 512,
        "width": WIDTH,
        "layers": LAYERS,
        "heads": WIDTH // 32,
        "kv_heads": WIDTH // 32,
        "head_dim": 32,
        "ffn": FFN,
        "context": 1024,
        "qk_norm": "layer",
        "tied": False,
    } | copy.deepcopy(ARMS[arm])


def couples(arm: dict[str, Any]) -> bool:
    """Whether an arm chooses among later tokens."""
    experts = arm.get("experts", {})
    chooses = experts.get("router") != "token_choice" and max(experts.get("groups", {"": 1}).values()) > 1
    return chooses or "depth" in arm


def run(job: Job, folder: Path, results: Path) -> None:
    """Train, and append what came out to the results."""
    path = folder / "recipes" / f"{job.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe(job, folder), sort_keys=False))
    begin = time.time()
    log = folder / "logs" / f"{job.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TIMED, str(path)]
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{job.name} failed, see {log}:\n{log.read_text()[-2000:]}")
    processor = cpu_seconds(log.read_text())
    result = asdict(job) | {"cpu_seconds": processor, "wall_seconds": round(time.time() - begin)}
    result |= measured(folder / "runs" / job.name, job.steps)
    write_result(results, result)
    print(f"{job.name}: {processor} CPU seconds, held-out loss {endpoint(result):.4f}", flush=True)


def measured(run: Path, steps: int) -> dict[str, Any]:
    """Training curve and held-out losses of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["step"] <= steps]
    curve = {
        name: [round(line[key], 4) for line in training]
        for name, key in (("loss", "loss"), ("text", "loss/modality/text"), ("image", "loss/modality/image"))
    }
    found: dict[str, Any] = {"curve_steps": [line["step"] for line in training], "curve": curve}
    rates = sorted(line["tokens_per_second"] for line in training)
    found["tokens_per_second"] = round(rates[len(rates) // 2])
    last = lines[-1]
    if "tokens_without_expert" in last:  # as experts choose, and as auxiliary routers say
        found["without_expert"] = [round(line["tokens_without_expert"], 4) for line in (training[-1], last)]
    found["held_out"] = losses(last, "")
    if "router_agreement" in last:
        found |= {"by_choice": losses(last, "expert_choice/"), "router_agreement": round(last["router_agreement"], 4)}
    return found


def losses(figures: dict[str, float], prefix: str) -> dict[str, float]:
    """Validation losses in total, by modality and by source."""
    start = f"{prefix}validation_loss"
    return {
        name.removeprefix(start).strip("/") or "loss": round(figure, 4)
        for name, figure in figures.items()
        if name.startswith(start)
    }


# ---------------------------------------------------------------------------------------------------------- the sweep


def jobs(results: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """The runs that are wanted.

    The main arms at every rate, then with the best rate other seeds and other numbers of steps; then the controls at
    every rate. The rates of an arm go on until the best one lies between two others.
    """
    for arm in MAIN:
        yield from (Job(arm, rate, SEEDS[0]) for rate in rates(results, arm))
    best = {arm: rate for arm in MAIN if (rate := best_rate(results, arm)) is not None}
    for seed in SEEDS[1:]:
        yield from (Job(arm, rate, seed) for arm, rate in best.items())
    for arm, lengths in LENGTHS.items():
        yield from (Job(arm, best[arm], SEEDS[0], steps) for steps in lengths if arm in best)
    for arm in ARMS:
        if arm not in MAIN:
            yield from (Job(arm, rate, SEEDS[0]) for rate in rates(results, arm))


def rates(results: Iterable[dict[str, Any]], arm: str) -> list[float]:
    """The learning rates to try for an arm, as far as can be said with what is known."""
    wanted = set(RATES)
    found = tried(results, arm)
    if wanted <= found.keys():
        best = min(found, key=lambda rate: found[rate])
        wanted |= found.keys()
        wanted |= {float(f"{3 * best:.1g}")} if best == max(found) else set()
        wanted |= {float(f"{best / 3:.1g}")} if best == min(found) else set()
    return sorted(wanted)


def best_rate(results: Iterable[dict[str, Any]], arm: str) -> float | None:
    """The rate with the lowest held-out loss, where all were tried."""
    found = tried(results, arm)
    return min(found, key=lambda rate: found[rate]) if set(rates(results, arm)) <= found.keys() else None


def tried(results: Iterable[dict[str, Any]], arm: str) -> dict[float, float]:
    """What counts, by rate, of the runs of an arm that choose its rate."""
    return {
        one["rate"]: endpoint(one)
        for one in results
        if one["arm"] == arm and one["seed"] == SEEDS[0] and one["steps"] == STEPS
    }


def endpoint(result: dict[str, Any], kind: str = "held_out") -> float:
    """What counts: the held-out losses of the sources with their weights in training. It was fixed before any run."""
    return sum(weight * result[kind][f"source/{source}"] for source, weight in WEIGHTS.items())


def missing(wanted: Iterable[Job], results: Iterable[dict[str, Any]]) -> list[Job]:
    done = {Job(one["arm"], one["rate"], one["seed"], one["steps"]) for one in results}
    return [job for job in wanted if job not in done]


# ----------------------------------------------------------------------------------------------------------- the demo

DEMO = Path("runs/demo-moma")
"""Where `train/moma-cpu.yaml` expects what it reads."""

DEMO_JOBS = [Job("dense", 9e-3, 0, 60), *(Job(arm, 9e-3, 0, 120) for arm in ("dense", "1t1i", "4t4i"))]


def demo() -> None:
    """Three arms for 120 steps each, then a larger model that draws and describes, and its report."""
    folder, results = DEMO.absolute(), DEMO.absolute() / "results.jsonl"
    prepare(folder, None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run(job, folder, results), missing(DEMO_JOBS, read_results(results))))
    once(folder / "moma-done", "train", "train/moma-cpu.yaml", f"run={DEMO / 'moma-cpu'}")
    report = DEMO / "report.html"
    subprocess.run([sys.executable, "-m", "mm", "report", DEMO / "moma-cpu", report, "--samples", "24"], check=True)
    print(f"\n{'':12}{'steps':>6}{'held-out loss':>15}{'text':>8}{'image':>8}{'experts look ahead':>20}")
    for one in read_results(results):
        loss, parts = endpoint(one), one["held_out"]
        ahead = f"{endpoint(one, 'by_choice'):>20.3f}" if "by_choice" in one else ""
        modalities = f"{parts['modality/text']:>8.3f}{parts['modality/image']:>8.3f}"
        print(f"{one['arm']:12}{one['steps']:>6}{loss:>15.3f}{modalities}{ahead}")
    print(f"\nDocs: docs/moma.md. What the larger model draws and says: {report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo")
    for name in ("prepare", "sweep"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
    commands.choices["prepare"].add_argument("--dictionary", type=Path, help="Debian's dict-gcide_….deb")
    commands.choices["sweep"].add_argument("--parallel", type=int, default=2)
    commands.choices["sweep"].add_argument("--minutes", type=float, default=1e9, help="start no run after that")
    options = parser.parse_args()
    if options.command == "demo":
        demo()
    elif options.command == "prepare":
        prepare(options.folder.absolute(), options.dictionary)
    else:
        folder = options.folder.absolute()
        sweep(
            lambda: missing(jobs(results := read_results(RESULTS)), results),
            lambda job: run(job, folder, RESULTS),
            options.parallel,
            options.minutes,
        )


if __name__ == "__main__":
    main()
