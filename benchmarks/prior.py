"""Token weights by a reference against plain next-token prediction: a sweep over arms and seeds, and what it costs.

    pictures, captions ─▶ BPE ─┬─▶ reference in folds ─▶ column ─▶ arms ─┐
                               └─▶ judges, with and without pictures ────┴─▶ prior.jsonl ─▶ benchmarks.prior_table

Two settings. `adapter`: drawings enter through a frozen encoder; a title says what the picture shows, the gloss of its
noun follows from the title, and the boilerplate is much the same everywhere. `fusion`: composed scenes enter as codes,
and a caption says which things stand where. In both, a model of words alone predicts much of a caption, and weights
have something to tell apart. What counts is the held-out loss of two kinds of tokens. Which are *image-related* is
decided without any weight: by judges, models of other seeds trained plainly with pictures and without, whose losses on
held-out captions are compared token by token.

    python -m benchmarks.prior prepare FOLDER --wordnet wordnet-base.deb    captions, BPE, reference: minutes, once
    python -m benchmarks.prior prepare OTHER --tokenizer RUN                scenes, BPE, codes, reference
    python -m benchmarks.prior sweep FOLDER      all runs of that setting, two at a time; repeated, it goes on

An image tokenizer for the scenes is what `python -m benchmarks.moma prepare OUT` trains: OUT/tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import yaml
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.sweeps import TIMED, cpu_seconds, read_results, slug, sweep, write_result
from mm import configure
from mm.allow import allow
from mm.data import columns
from mm.data.card import Card
from mm.data.columns import Row
from mm.data.index import Index, index_card
from mm.data.sources.debian import package_files
from mm.data.sources.writer import Member, write_shards
from mm.demo import captioned_pictures
from mm.evaluate import Options, build_choice_suite, evaluate
from mm.evaluate.model import ModelAnswerer
from mm.model.multimodal import MultimodalLM, build_tokenizers
from mm.objectives.next_token import NextToken
from mm.packing.batch import IGNORE, Batch
from mm.packing.collate import Document, Processor
from mm.packing.weights import REFERENCE, Reference, reference_type, targets, words_with_loss
from mm.sample import Image, Modality, Sample
from mm.tokenizers.base import MediaTokenizer
from mm.train.export import load_trained
from mm.train.recipe import Recipe

RESULTS = Path(__file__).with_name("prior.jsonl")
DEMO = Path("data_cards/demo/card.yaml")
WORDNET = PurePosixPath("usr/share/wordnet")

STEPS, REFERENCE_STEPS, FOLDS = 300, 160, 4
SCENES = 8000
WORDS = {"adapter": 2048, "fusion": 512}
"""Ids of the BPE."""
SEEDS = (0, 1, 2)
JUDGES = (100, 101)
"""Seeds of the judges."""
PLAIN, BLIND = "NTP", "judge without picture"
RATES = {PLAIN: (SEEDS[0], (1e-3, 3e-3, 9e-3)), BLIND: (JUDGES[0], (3e-4, 1e-3, 3e-3))}
"""Learning rates that are tried, and by which seed. Judges without pictures have fewer tokens in a step."""

DROP = 0.1
"""Nats that a picture saves the judges on a token, from which on the token is image-related. Fixed before any run."""

LEAST_WEIGHT = 1e-3
"""So that a word of which the reference is sure can be divided out."""

PRIOR = "mm.packing.weights.Prior"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "PRIOR 0.5": {"weights": {"_target_": PRIOR, "alpha": 0.5}},
    "PRIOR 1": {"weights": {"_target_": PRIOR, "alpha": 1.0}},
    "PRIOR 2": {"weights": {"_target_": PRIOR, "alpha": 2.0}},
    "inverse 0.5": {"weights": {"_target_": "mm.packing.weights.InversePrior", "alpha": 0.5}},
    "shuffled over all": {"weights": {"_target_": PRIOR, "column": "shuffled"}},
    "shuffled within": {"weights": {"_target_": PRIOR, "column": "shuffled_within"}},
    "inverted": {"weights": {"_target_": "benchmarks.prior.Inverted"}},
    "focal": {"objective": {"_target_": "benchmarks.prior.Focal"}},
    # AdamW does not see the size of gradients, but clipping does: here every step of both is clipped to one norm.
    "NTP, one norm": {"clip": 0.01},
    "PRIOR 1, one norm": {"weights": {"_target_": PRIOR, "alpha": 1.0}, "clip": 0.01},
    BLIND: {"blind": True},
    # As many tokens, of an eighth of the scenes: whether weights help where data is repeated.
    "NTP, repeated": {"scenes": SCENES // 8},
    "PRIOR 0.5, repeated": {"weights": {"_target_": PRIOR, "alpha": 0.5}, "scenes": SCENES // 8},
    "PRIOR 1, repeated": {"weights": {"_target_": PRIOR, "alpha": 1.0}, "scenes": SCENES // 8},
}
MAIN = (PLAIN, "PRIOR 0.5", "PRIOR 1", "PRIOR 2")


def plain_of(arm: str) -> str:
    """What an arm is compared with."""
    return "NTP, repeated" if "scenes" in ARMS[arm] else PLAIN


@dataclass(frozen=True)
class Inverted(Reference):
    """A control: predictable words weigh most, ``w = p``."""

    def weight(self, log_probabilities: np.ndarray) -> np.ndarray:
        return np.exp(log_probabilities)


@dataclass(frozen=True)
class Focal(NextToken):
    """A control without reference: ``w = 1 − p`` of the model itself (Lin et al. 2017, γ = 1), per caption as PRIOR.

    words: ids from this one on are no words, and weigh 1
    """

    words: int = WORDS["adapter"]

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        with torch.no_grad():
            predicted: Any = model(batch, self.head_loss)
        labels = batch.labels[batch.labels != IGNORE]  # in the order of the losses
        is_word = labels < self.words
        labelled = (batch.labels != IGNORE).nonzero().squeeze(1)[is_word]
        document = batch.document_of_token().to(labelled.device)[labelled]
        raw = -torch.expm1(-predicted.nll[is_word].double())
        sums = torch.zeros(len(batch.rows), 2, dtype=torch.float64, device=raw.device)
        sums.index_add_(0, document, torch.stack([raw, torch.ones_like(raw)], 1))
        factors = raw * (sums[:, 1] / sums[:, 0].clamp(min=1e-12))[document]
        weights = batch.weights.index_copy(0, labelled, factors.to(batch.weights.dtype))
        return super().loss(model, replace(batch, weights=weights), denominators, sources)


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: str
    arm: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        return slug(self.arm, "lr", f"{self.rate:g}", "seed", self.seed, "steps", self.steps)

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Job:
        return cls(*(result[name] for name in ("setting", "arm", "rate", "seed", "steps")))


# -------------------------------------------------------------------------------------------------------- the captions


def glosses(wordnet: Path) -> dict[str, str]:
    """The definition of every noun's most frequent meaning, from Debian's wordnet-base."""
    files = dict(package_files(wordnet, WORDNET, ("data.noun", "index.noun")))
    data, found = files["data.noun"], {}
    for line in files["index.noun"].decode().splitlines():
        if line.startswith(" "):  # the licence
            continue
        lemma, *fields = line.split()
        senses = int(fields[1])
        start = int(fields[-senses])
        gloss = data[start : data.index(b"\n", start)].decode().partition(" | ")[2]
        found[lemma] = re.split(r'; "|\(|;', gloss)[0].strip() or gloss.strip()
    return found


def caption(facts: Mapping[str, str], meanings: Mapping[str, str]) -> str:
    """A title, what its noun means, and what a collection writes under every drawing."""
    gloss = meanings.get(facts["head"].lower().replace(" ", "_"))
    meaning = f" {facts['head'].capitalize()}: {gloss}." if gloss else ""
    return (
        f"{facts['caption'].capitalize()}.{meaning} Clip art of the category {facts['category']}, drawn by "
        f"{facts['author'] or 'an unknown artist'} for the Open Clip Art Library and released into the public domain."
    )


def write_captions(folder: Path, meanings: Mapping[str, str]) -> None:
    """The demo's drawings with longer captions; validation and held-out drawings are one split."""
    card = Card.load(DEMO)
    splits = {"train": ("train",), "heldout": ("validation", "heldout")}
    for split, sources in splits.items():
        write_shards(_members(card, sources, meanings), folder, split, 500)
    about = {
        "name": "captions",
        "description": "The demo's drawings; captions of a title, a gloss and boilerplate.",
        "licence": "public domain; glosses under the WordNet 3.0 licence",
        "origin": "data_cards/demo and Debian's wordnet-base, by benchmarks/prior.py",
        "format": "webdataset",
        "splits": {split: {"shards": [f"{split}-*.tar"]} for split in splits},
        "sample": [{"image": "webp"}, {"text": "txt"}],
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(about, sort_keys=False))


def _members(card: Card, splits: Sequence[str], meanings: Mapping[str, str]) -> Iterator[Member]:
    for path in (path for split in splits for path in card.shards(split)):
        shard = card.open(path)
        for number, scanned in enumerate(shard.scan()):
            assert scanned.record is not None
            fields = scanned.record.fields
            key = f"{Path(path).stem}-{number:05d}"
            yield Member(key, {"webp": fields["webp"], "txt": caption(json.loads(fields["json"]), meanings)})
        shard.close()


def setting_of(folder: Path) -> str:
    return "fusion" if (folder / "tokenizer.yaml").exists() else "adapter"


def card_of(folder: Path) -> Path:
    return folder / "captions" / "card.yaml"


def prepare(folder: Path, wordnet: Path | None, tokenizer: Path | None) -> None:
    """Captions, BPE, the reference and its shuffled controls; what is there already is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, card = folder / "captions", str(card_of(folder))
    if tokenizer is not None:
        loaded = {"_target_": "mm.train.tokenizer.TrainedTokenizer.load", "weights": str(tokenizer.absolute())}
        (folder / "tokenizer.yaml").write_text(yaml.safe_dump(loaded))
        if not card_of(folder).exists():
            command("data", "build", "scenes", str(captions), f"samples={SCENES}")
    elif wordnet is not None and not card_of(folder).exists():
        captions.mkdir(exist_ok=True)
        write_captions(captions, glosses(wordnet))
    if not (folder / "bpe").exists():
        size = WORDS[setting_of(folder)]
        command("data", "bpe", card, "--size", str(size), "--out", str(folder / "bpe"))
    if tokenizer is not None:
        preset = str(folder / "tokenizer.yaml")
        for split in ("train", "heldout"):
            where = ["--split", split, "--folder", str(folder / "index" / "index")]
            command("data", "tokenize", card, "--with", preset, *where)
    cost = folder / "reference.json"
    if not cost.exists():  # so that a repeated command, which finds it all done, does not tell how little that took
        begin = processor_seconds()
        score(folder)
        spent = round(processor_seconds() - begin)
        cost.write_text(json.dumps({"setting": setting_of(folder), "arm": "reference", "cpu_seconds": spent}))
    for name, within in (("shuffled", False), ("shuffled_within", True)):
        write_shuffled(train_index(folder), name, within)
    if not any(one["arm"] == "reference" for one in results_of(folder)):
        write_result(RESULTS, json.loads(cost.read_text()))


def command(*arguments: str) -> None:
    """Run a command of the suite, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "mm", *arguments], check=True, env=environment)


def processor_seconds() -> float:
    """Of all processes that this one has started and waited for."""
    spent = os.times()
    return spent.children_user + spent.children_system


def score(folder: Path) -> None:
    """The reference: trained on the captions in folds, and its column."""
    path = folder / "reference.yaml"
    recipe = base_recipe(folder, "reference", REFERENCE_STEPS) | {
        "run": str(folder / "reference"),
        "model": {"decoder": {"config": DECODER}},
    }
    recipe["data"] = {"workers": 0}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with_options = ["--with", "mm.score.reference.ReferenceLM", "--model", str(path), f"folds={FOLDS}"]
    command("data", "score", str(card_of(folder)), *with_options, "--folder", str(folder / "index" / "index"))


def train_index(folder: Path, split: str = "train") -> Index:
    return index_card(Card.load(card_of(folder)), split, folder / "index" / "index", progress=False)


def write_shuffled(index: Index, name: str, within: bool) -> None:
    """The reference's column with its log-probabilities in random order, over all tokens or within each caption."""
    (fingerprint,) = columns.fingerprints(index, REFERENCE)
    values = columns.load(index, REFERENCE, fingerprint).to_pylist()
    draw = np.random.default_rng(0)
    logs = [np.array(one[0]["log_probabilities"], np.float16) for one in values]
    if within:
        mixed = [draw.permutation(of_caption) for of_caption in logs]
    else:
        mixed = np.split(draw.permutation(np.concatenate(logs)), np.cumsum([len(one) for one in logs])[:-1])
    rows = iter([[one[0] | {"log_probabilities": new}] for one, new in zip(values, mixed, strict=True)])

    def values_of(shard: Iterator[Row]) -> Iterator[Any]:
        return (next(rows) for _ in shard)

    if not columns.fingerprints(index, name):
        columns.ensure(index, name, fingerprint, values_of, reference_type(), 0, progress=False)


# ------------------------------------------------------------------------------------------------------------- one run

DECODER = {
    "vocabulary": 2048,
    "width": 192,
    "layers": 4,
    "heads": 3,
    "kv_heads": 3,
    "head_dim": 64,
    "ffn": 512,
    "context": 512,
}
ENCODER = {"preset": "encoders/tf-efficientnet-lite0.yaml"}
ADAPTER = {"_target_": "mm.encoders.adapters.AveragePool", "tokens": 4, "norm": True}


def base_recipe(folder: Path, name: str, steps: int) -> dict[str, Any]:
    model: dict[str, Any] = {"decoder": {"config": DECODER}}
    if setting_of(folder) == "fusion":
        model["tokenizers"] = {"image": yaml.safe_load((folder / "tokenizer.yaml").read_text())}
    else:
        model["encoders"] = {"image": {**ENCODER, "adapter": ADAPTER}}
    return {
        "name": name,
        "steps": steps,
        "model": model,
        "tokenizer": {"path": str(folder / "bpe")},
        "packing": {"capacity": 512, "batch": 4, "window": 64},
        "micro_batch": 4,
        "precision": "fp32",
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"warmup": 0.06, "floor": 0.02},
        "log_every": 10,
        "log_to": [],
        "keep": 1,
    }


def recipe(job: Job, folder: Path) -> dict[str, Any]:
    """The recipe of a run."""
    arm = ARMS[job.arm]
    weights = {"arm": arm["weights"]} if "weights" in arm else {}
    chosen = {"where": f'key < "train-0-{arm["scenes"]:08}"'} if "scenes" in arm else {}
    made = base_recipe(folder, job.name, job.steps) | {
        "run": str(folder / "runs" / job.name),
        "seed": job.seed,
        "objective": arm.get("objective", {"_target_": "mm.objectives.next_token.NextToken"}),
        "data": {
            "sources": {"captions": {"card": str(card_of(folder)), "weights": weights} | chosen},
            "index": str(folder / "index"),
            "workers": 0,
        },
    }
    if job.arm == "focal":
        made["objective"] = made["objective"] | {"words": WORDS[job.setting]}
    made["optim"] = {"lr": job.rate, "weight_decay": 0.1, "clip": arm.get("clip", 1.0)}
    if arm.get("blind"):
        made["model"] = {"decoder": {"config": DECODER}}
        made["tokenizer"] = {"path": str(folder / "bpe"), "words_only": True}
        if job.setting == "fusion":  # as many captions a step as the others read, whose codes are most of their tokens
            made |= {"packing": made["packing"] | {"batch": 1}, "micro_batch": 1}
    elif job.setting == "adapter":
        made["optim"]["parts"] = [{"match": r"^encoders\.", "freeze": True}]
    return made


def run(job: Job, folder: Path) -> None:
    """Train, measure on held-out drawings, and append what came out to the results."""
    path, log = folder / "recipes" / f"{job.name}.yaml", folder / "logs" / f"{job.name}.txt"
    for file in (path, log):
        file.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe(job, folder), sort_keys=False))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        training = [sys.executable, "-c", TIMED, str(path)]
        measuring = [sys.executable, "-m", "benchmarks.prior", "measure", str(folder), job.name]
        for command_line in (training, measuring):
            done = subprocess.run(command_line, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise RuntimeError(f"{job.name} failed, see {log}:\n{log.read_text()[-2000:]}")
    processor = cpu_seconds(log.read_text())
    found = json.loads((folder / "measured" / f"{job.name}.json").read_text())
    write_result(RESULTS, asdict(job) | {"cpu_seconds": processor, "device": device_name()} | found)
    print(f"{job.name}: {processor} CPU seconds, held-out loss {found['held_out']:.4f}", flush=True)


def _entering(sample: Sample, tokenizers: Mapping[Modality, MediaTokenizer]) -> Sample:
    """The sample with its pictures as the model reads them."""
    if not tokenizers:
        return sample
    reader = tokenizers[Modality.IMAGE]
    parts = [reader.read([part])[0] if isinstance(part, Image) else part for part in sample.parts]
    return replace(sample, parts=tuple(parts))


@torch.no_grad()
def predictions(model: MultimodalLM, processor: Processor, document: Document) -> tuple[Tensor, Tensor]:
    """(n, V) log-probabilities where the n words of a document that bear loss are predicted, and their (n,) ids."""
    batch = processor.collate([[document]], [[(0, 0, 0)]])
    predicting = (batch.labels != IGNORE).nonzero().squeeze(1)
    words = predicting[torch.from_numpy(words_with_loss(document)[targets(document)])]
    logits = model.hidden(batch)[words] @ model.decoder.head_weight.T
    return logits.log_softmax(-1), batch.labels[words]


def without_weights(logs: Tensor, reference: Tensor, factor: Reference) -> Tensor:
    """(n, V) log-probabilities that are a weighted model's belief, its weights divided out.

    Least weighted loss is at ``q ∝ p w`` and not at p, where a token's weight depends on which token it is: of a model
    that learnt perfectly, ``p ∝ q / w``. What a caption's weights were divided by is taken for a constant.

    Args:
        logs: (n, V) of the model.
        reference: (n, V') of a reference at the same words; ids beyond V' are no words and weigh 1.
    """
    weights = torch.ones_like(logs)
    known = factor.weight(reference.double().numpy())
    weights[:, : known.shape[1]] = torch.from_numpy(known).clamp(min=LEAST_WEIGHT).to(logs.dtype)
    return (logs - weights.log()).log_softmax(-1)


def measure(name: str, folder: Path, most: int) -> None:
    """What a run says of every held-out word, and its accuracy on a suite of held-out drawings.

    Of every word its loss, whether it was the most probable one, and its loss with the run's weights divided out.

    Args:
        most: pictures of the suite.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = folder / "measured"
    out.mkdir(exist_ok=True)
    trained = load_trained(folder / "runs" / name)
    index = train_index(folder, "heldout")
    tokenizers = build_tokenizers(trained.recipe.model)
    factor, reference = _factor(trained.recipe), load_trained(folder / "reference" / f"fold-0-of-{FOLDS}")
    columns_of: dict[str, list[np.ndarray]] = {"nll": [], "right": [], "divided": []}
    for sample in map(index.sample, range(index.rows)):
        document = trained.processor.document(_entering(sample, tokenizers))
        logs, ids = predictions(trained.model, trained.processor, document)
        divided = logs
        if factor is not None:
            known, same = predictions(reference.model, reference.processor, reference.processor.document(sample))
            assert torch.equal(ids, same)
            divided = without_weights(logs, known[:, : WORDS[setting_of(folder)]], factor)
        columns_of["nll"].append(-logs.gather(1, ids[:, None])[:, 0].numpy())
        columns_of["right"].append((logs.argmax(1) == ids).numpy())
        columns_of["divided"].append(-divided.gather(1, ids[:, None])[:, 0].numpy())
    joined = {column: np.concatenate(parts) for column, parts in columns_of.items()}
    if trained.recipe.objective["_target_"].endswith("Focal"):
        joined.pop("divided")  # its weights were of the model as it was on the way
    np.savez(out / f"{name}.npz", sizes=np.array([len(one) for one in columns_of["nll"]]), **joined)
    found = {"held_out": round(float(joined["nll"].mean()), 4)}
    if trained.model.encoders:
        records = list(captioned_pictures(Card.load(DEMO), "heldout"))[:most]
        titled = [replace(record, caption=f"{record.caption.capitalize()}.") for record in records]
        suite = build_choice_suite(titled, easy_per_picture=1, hard_per_picture=2, seed=0)
        answerer = ModelAnswerer(trained.model, trained.processor)
        options = Options(prompt="", generation_questions=0, resamples=100)
        with Progress(disable=True) as progress:
            summary = evaluate(suite, answerer, options, progress).summary
        found |= {key: round(summary[key], 4) for key in ("accuracy_likelihood", "shuffled_images", "chance")}
    (out / f"{name}.json").write_text(json.dumps(found))


def _factor(recipe: Recipe) -> Reference | None:
    """What gave the words their weights by what they are, if anything did."""
    weights = recipe.data.sources["captions"].weights
    built = configure.build(weights["arm"], Reference) if weights else None
    return built if built is not None and built.column == REFERENCE else None


# ----------------------------------------------------------------------------------------------------------- the sweep


def jobs(setting: str, results: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """The runs that are wanted: all rates, then judges, main arms and controls at the best of them."""
    yield from (Job(setting, arm, rate, seed) for arm, (seed, rates) in RATES.items() for rate in rates)
    best = {arm: best_rate(results, arm) for arm in RATES}
    if (rate := best[PLAIN]) is None or None in best.values():
        return
    yield from judges(setting, best)
    controls = [arm for arm in ARMS if arm not in (*MAIN, BLIND) and is_of(setting, arm)]
    for arms in (MAIN, controls):
        yield from (Job(setting, arm, rate, seed) for seed in SEEDS for arm in arms)


def is_of(setting: str, arm: str) -> bool:
    """Drawings are repeated in any case."""
    return setting == "fusion" or "scenes" not in ARMS[arm]


def judges(setting: str, best: Mapping[str, float | None]) -> list[Job]:
    """Plain models with pictures and without, a pair a seed; `best` has the rates of both."""
    return [Job(setting, arm, rate, seed) for seed in JUDGES for arm, rate in best.items() if rate is not None]


def best_rate(results: Sequence[Mapping[str, Any]], arm: str) -> float | None:
    """The rate of `RATES` at which an arm ends best; None before all were tried."""
    seed, rates = RATES[arm]
    tried = {one["rate"]: one["held_out"] for one in results if one["arm"] == arm and one["seed"] == seed}
    return min(tried, key=lambda rate: tried[rate]) if set(rates) <= tried.keys() else None


def results_of(folder: Path) -> list[dict[str, Any]]:
    """Of the folder's setting, the reference's cost among them."""
    return [one for one in read_results(RESULTS) if one["setting"] == setting_of(folder)]


def missing(folder: Path) -> list[Job]:
    results = [one for one in results_of(folder) if one["arm"] != "reference"]
    done = {Job.of(one) for one in results}
    return [job for job in jobs(setting_of(folder), results) if job not in done]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "sweep", "measure"):
        commands.add_parser(name).add_argument("folder", type=Path)
    what = commands.choices["prepare"].add_mutually_exclusive_group(required=True)
    what.add_argument("--wordnet", type=Path, help="Debian's wordnet-base_….deb: the setting `adapter`")
    what.add_argument("--tokenizer", type=Path, help="run of an image tokenizer: the setting `fusion`")
    commands.choices["sweep"].add_argument("--parallel", type=int, default=2)
    commands.choices["sweep"].add_argument("--minutes", type=float, default=1e9, help="start no run after that")
    commands.choices["measure"].add_argument("run", help="name of the run")
    commands.choices["measure"].add_argument("--pictures", type=int, default=200, help="of the suite")
    options = parser.parse_args()
    allow(["benchmarks"])  # recipes name classes of this file
    folder = options.folder.absolute()
    if options.command == "prepare":
        prepare(folder, options.wordnet, options.tokenizer)
    elif options.command == "sweep":
        sweep(lambda: missing(folder), lambda job: run(job, folder), options.parallel, options.minutes)
    else:
        measure(options.run, folder, options.pictures)


if __name__ == "__main__":
    main()
