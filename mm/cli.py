"""The command ``mm``."""

from __future__ import annotations

if not __package__:
    raise SystemExit("Run `mm …` or `python -m mm …`: run as a file, mm/tokenizers would hide the library tokenizers.")

import functools
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mm import configure, terminal
from mm.allow import allow
from mm.configure import RecipeError
from mm.data.failures import Stopped, in_sentences
from mm.terminal import console, errors, paragraph, printable, styled

if TYPE_CHECKING:
    from mm.data.cache import ShardCache
    from mm.data.card import Card

# OpenMP threads that spin long for each other make a busy machine several times slower (docs/demo.md). GNU's library
# reads this when torch is imported; a policy of the user's own stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Pre-train vision-language models.")
preset_app = typer.Typer(no_args_is_help=True, help="The files a recipe is made of: list, read, copy.")
app.add_typer(preset_app, name="preset")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Checkpoints of a run: list, verify, average, consolidate.")
app.add_typer(checkpoint_app, name="checkpoint")
data_app = typer.Typer(no_args_is_help=True, help="Shards and cards: build, look at samples.")
app.add_typer(data_app, name="data")


MANY = 1_000_000
"""The largest number of things that are looked at or held one by one."""


def finite(value: float) -> float:
    """The value of an option unless it is not a number, which the bounds of an option let through."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


@app.callback()
def suite() -> None:
    """Pre-train vision-language and omni models."""


@preset_app.command("ls")
def list_presets(
    folder: Annotated[str | None, typer.Argument(help=f"one of {', '.join(configure.PRESET_FOLDERS)}")] = None,
) -> None:
    """All presets, or those of one folder."""
    groups = configure.presets()
    if folder is not None and folder.rstrip("/") not in groups:
        raise RecipeError(f"no preset folder {folder!r}; expected {', '.join(groups)}")
    for name, presets in groups.items():
        if presets and folder in (None, name, f"{name}/"):
            table = Table("preset", "what it is", title=name, title_justify="left", expand=False)
            for preset in presets:
                table.add_row(preset.path, preset.description)
            console.print(table)


@preset_app.command("show")
def show_preset(path: Annotated[str, typer.Argument(help="such as encoders/siglip.yaml")]) -> None:
    """The content of a preset, and where it lies."""
    file = configure.find_preset(path)
    errors.print(f"# {file}", soft_wrap=True)
    console.print(paragraph(file.read_text(encoding="utf-8")), soft_wrap=True, end="")


@preset_app.command("copy")
def copy_preset(
    path: Annotated[str, typer.Argument(help="such as encoders/siglip.yaml")],
    to: Annotated[Path | None, typer.Argument(help="the same path in the working directory, if left out")] = None,
) -> None:
    """A copy to edit. A recipe finds it first when it lies under the same path in the working directory."""
    source, target = configure.find_preset(path), to if to is not None else Path(path)
    if target.exists():
        raise RecipeError(f"{target} exists already; name another file, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    console.print(f"{source} → {target}", soft_wrap=True)


# -------------------------------------------------------------------------------------------------------------- cache

CacheLimit = Annotated[
    str | None,
    typer.Option(
        "--cache", help="keep remote shards on disk, up to so much, such as 100GB; else they are read in place"
    ),
]
CacheFolder = Annotated[Path, typer.Option(help="where --cache keeps them, as data.cache.folder of a recipe")]
CACHE_FOLDER = Path("~/.cache/mm/shards")


def open_cache(limit: str | None, folder: Path) -> ShardCache | None:
    """The cache that a recipe with this limit and folder would use, so that nothing is transferred twice."""
    from mm.data.cache import CacheOptions

    if limit is None:
        return None
    try:
        return CacheOptions(str(folder), limit).open()
    except ValueError as error:
        raise RecipeError(f"--cache: {error}") from error


def load_card(path: Path, limit: str | None, folder: Path) -> Card:
    """A card whose shards are read through the cache, if there is to be one."""
    from mm.data.card import Card

    return replace(Card.load(path), cache=open_cache(limit, folder))


# ----------------------------------------------------------------------------------------------------------- training

RecipePath = Annotated[Path, typer.Argument(help="a recipe; `mm preset ls train` lists some")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes to the recipe: optim.lr=1e-4 seed=1")]
Run = Annotated[Path, typer.Argument(help="a run folder, a checkpoint in it, or an export")]
Device = Annotated[str, typer.Option(help="where to compute: cpu or cuda; auto takes cuda where there is one")]


def device_named(name: str) -> str:
    """The device of ``--device``, which works.

    Raises:
        RecipeError: it does not.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"--device {name} cannot be used here ({reason}); say cpu, or leave it out") from None
    return name


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where everything goes; a stopped demo goes on")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Pre-train, instruct, evaluate and report on the embedded corpus: minutes on two CPU cores."""
    from mm.demo import run_demo

    run_demo(folder, overrides or [], console)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    profile: Annotated[
        str | None, typer.Option(help="steps to profile on every process, such as 10-12; see RUN/profile")
    ] = None,
) -> None:
    """Train a recipe. Repeating the command resumes the run; under torchrun it uses all processes."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from mm.train.loop import train as train_recipe
    from mm.train.parallel import local_world
    from mm.train.profile import Steps
    from mm.train.recipe import Recipe

    steps = Steps.parse(profile) if profile is not None else None
    # Under torchrun, whoever fails first is named, with its traceback, among those that fail because of it.
    checkpoint = record(train_recipe)(Recipe.load(recipe, overrides or []), steps)  # None where it was asked to stop
    if checkpoint and local_world()[0] == 0:
        console.print(styled(("done", "bold"), f", the last checkpoint is {checkpoint}"), soft_wrap=True)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what a recipe would train on: samples, tokens, fill, steps, FLOPs and balance over ranks."""
    from mm.train.preview import preview
    from mm.train.recipe import Recipe

    for table in preview(Recipe.load(recipe, overrides or [])):
        console.print(table)


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="how many", min=1, max=MANY)] = 8,
    gpu: Annotated[str, typer.Option(help="rtx-4090, a100-40g, a100-80g, h100 or h200")] = "a100-80g",
    mfu: Annotated[float, typer.Option(help="share of the data sheet's FLOP/s to expect", callback=finite)] = 0.4,
) -> None:
    """Show whether a recipe fits on some GPUs, what takes memory, the time of a step, what to change. Needs no GPU."""
    from mm.train.estimate import gpu_named, report
    from mm.train.recipe import Recipe

    for table in report(Recipe.load(recipe, overrides or []), gpus, gpu_named(gpu), mfu):
        console.print(table)


@app.command()
def inspect(
    recipe: Annotated[Path, typer.Argument(help="a recipe or a run folder")],
    step: Annotated[int, typer.Option(help="global batch, from 0", min=0, max=10**9)] = 0,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("packs.html"),
    packs: Annotated[int, typer.Option(help="packs to show", min=1, max=MANY)] = 8,
) -> None:
    """Write a page that shows the packs of a step as the model sees them."""
    from mm.report.packs import inspect_page
    from mm.train.preview import planned_at
    from mm.train.recipe import Recipe

    file = recipe / "recipe.yaml" if recipe.is_dir() else recipe
    out.write_text(inspect_page(*planned_at(Recipe.load(file), step), packs), encoding="utf-8")
    console.print(f"{out} shows step {step}")


@app.command()
def doctor(
    shards: Annotated[list[str], typer.Argument(help="paths, globs, {0000..0099} ranges or URLs of shards")],
    capacity: Annotated[int, typer.Option(help="tokens of a pack", min=1, max=2**24)] = 4096,
    tokenizer: Annotated[str | None, typer.Option(help="preset, folder or hub name; else characters / 4")] = None,
    image_tokens: Annotated[int, typer.Option(help="tokens a picture", min=0, max=MANY)] = 256,
    parameters: Annotated[
        float, typer.Option(help="of the model, for the GPU hours", min=1, max=1e15, callback=finite)
    ] = 2e9,
    seconds: Annotated[float, typer.Option(help="how long to look", min=0, max=1e6, callback=finite)] = 60.0,
    samples: Annotated[int, typer.Option(help="how many samples to look at, at most", min=1, max=10**9)] = 10_000,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Look at any shards for a minute: fields, a card for them, bad samples, histograms, packs, GPU hours."""
    from mm.train.doctor import LookOptions, look

    options = LookOptions(capacity, tokenizer, image_tokens, parameters, seconds, samples)
    for part in look(shards, options, open_cache(cache, cache_folder)).report():
        console.print(paragraph(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="a run folder")],
    second: Annotated[Path, typer.Argument(help="another")],
) -> None:
    """Show what differs between two runs: recipe, versions, plan and data, figures, and where their losses part."""
    from mm.train.diff import diff as differences

    for table in differences(first, second):
        console.print(table)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    average: Annotated[bool, typer.Option("--average", help="the average over updates, see optim.average")] = False,
) -> None:
    """Write a trained model as safetensors with its recipe; every command that takes a run takes the export too."""
    from mm.train.export import export_run

    console.print(f"{export_run(run, out, average=average)} holds model.safetensors and recipe.yaml")


Checkpoint = Annotated[Path, typer.Argument(help="a checkpoint, such as RUN/checkpoints/step-00001000")]
ExportFolder = Annotated[Path, typer.Argument(help="folder to write")]


@checkpoint_app.command("ls")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Step, stage, size and date of all checkpoints of a run, and which are complete."""
    from mm.train.inventory import table_of

    console.print(table_of(run))


@checkpoint_app.command("verify")
def verify_checkpoint(path: Checkpoint) -> None:
    """Read every tensor: sizes of files, names and shapes, non-finite values. Exit status 1 if something is wrong."""
    from mm.train.inventory import verify

    verified = verify(path)
    for finding in verified.findings:
        console.print(finding, soft_wrap=True)
    verdict = (f"{len(verified.findings)} wrong", "red") if verified.findings else ("sound", "green")
    held = f": {verified.entries:,} entries, {verified.size / 1e6:,.1f} MB in {path}"
    console.print(styled(verdict, held), soft_wrap=True)
    raise typer.Exit(1 if verified.findings else 0)


@checkpoint_app.command("average")
def average_checkpoints(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    out: ExportFolder,
    last: Annotated[int, typer.Option(help="how many of the newest checkpoints", min=1, max=MANY)] = 5,
) -> None:
    """Export the mean of the weights of a run's last checkpoints."""
    from mm.train.export import export_mean

    console.print(f"{export_mean(run, last, out)} holds the mean of {last} checkpoints", soft_wrap=True)


@checkpoint_app.command("consolidate")
def consolidate_checkpoint(path: Checkpoint, out: ExportFolder) -> None:
    """Write a checkpoint's weights as one safetensors file, as `mm export` does those of a run."""
    from mm.train.checkpoint import read_position
    from mm.train.export import export_run

    step = read_position(path).step
    console.print(f"{export_run(path, out)} holds model.safetensors and recipe.yaml of step {step}", soft_wrap=True)


@app.command()
def report(
    run: Run,
    out: Annotated[Path, typer.Argument(help="the page to write")] = Path("report.html"),
    samples: Annotated[
        int,
        typer.Option(help="held-out pictures that the model describes, and whose captions it draws", min=0, max=MANY),
    ] = 0,
    device: Device = "auto",
) -> None:
    """Write a page with a run's loss curves, throughput, where time and memory go, recipe and versions.

    Samples are for runs that read pictures as codes.
    """
    from mm.report.run import report_of_run
    from mm.report.samples import samples_of_run

    out.write_text(
        report_of_run(run, samples_of_run(run, samples, device_named(device)) if samples else ()), encoding="utf-8"
    )
    console.print(f"{out} reports {run}")


# ---------------------------------------------------------------------------------------------------- trained models


@app.command("eval")
def evaluate(
    run: Run,
    suite: Annotated[Path, typer.Argument(help="an MMBench-style TSV")],
    out: Annotated[Path | None, typer.Option(help="folder for results.json and answers.jsonl; RUN/eval/SUITE")] = None,
    generate: Annotated[
        int, typer.Option(help="questions to answer also in words, under every rotation", min=0, max=10**9)
    ] = 200,
    device: Device = "auto",
) -> None:
    """Score a model on a multiple-choice suite, by likelihood and in words, with its controls."""
    from mm.evaluate import Options, read_suite
    from mm.evaluate import evaluate as run_suite
    from mm.evaluate.model import ModelAnswerer
    from mm.model.multimodal import build_tokenizers
    from mm.train.export import load_trained
    from mm.train.versions import versions

    trained = load_trained(run)
    options = Options(generation_questions=generate, about={"checkpoint": str(run), **versions()})
    with terminal.Progress(console=console) as progress:
        tokenizers = build_tokenizers(trained.recipe.model)
        answerer = ModelAnswerer(trained.model, trained.processor, tokenizers, device_named(device))
        results = run_suite(read_suite(suite), answerer, options, progress)
    folder = out or run / "eval" / suite.stem
    results.save(folder)  # before anything is printed, which may fail
    for table in results.tables():
        console.print(table)
    console.print(f"{folder} holds results.json and answers.jsonl")


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="what to ask or to draw; without it the picture is described")] = "",
    image: Annotated[Path | None, typer.Option(help="a picture file")] = None,
    max_tokens: Annotated[int, typer.Option(help="length of the answer at most", min=1, max=MANY)] = 64,
    pictures: Annotated[
        int, typer.Option(help="draw so many pictures of the prompt, where pictures are codes", min=0, max=MANY)
    ] = 0,
    out: Annotated[Path, typer.Option(help="folder for the pictures and a sheet of them")] = Path("pictures"),
    guidance: Annotated[
        float,
        typer.Option(
            help="how closely pictures follow the prompt; 1 is as in training", min=0, max=1000, callback=finite
        ),
    ] = 3.0,
    temperature: Annotated[
        float, typer.Option(help="of the codes; 0 takes the most probable ones", min=0, max=1000, callback=finite)
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="draw from so many of the most probable codes", min=1, max=10**9)
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="draw from the most probable codes up to this sum", min=0, max=1, callback=finite)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws", min=0, max=2**63 - 1)] = 0,
    size: Annotated[
        int, typer.Option(help="pixels a side, where the tokenizer takes several sizes", min=1, max=2**16)
    ] = 256,
    device: Device = "auto",
) -> None:
    """Answer a question about a picture, describe it, or draw pictures of a prompt."""
    from mm.evaluate.answerer import Prompt
    from mm.evaluate.model import ModelAnswerer
    from mm.model.multimodal import build_tokenizers
    from mm.model.sampling import Sampling
    from mm.report.pictures import save_pictures
    from mm.train.export import load_trained

    if image is None and not prompt and not pictures:
        raise RecipeError("give --prompt, --image or both; or --pictures, to draw")
    if image is not None and pictures:
        raise RecipeError("pictures are drawn from words alone: give --image or --pictures")
    trained = load_trained(run)
    answerer = ModelAnswerer(
        trained.model, trained.processor, build_tokenizers(trained.recipe.model), device_named(device)
    )
    if not pictures:
        question = Prompt(image.read_bytes() if image else None, prompt)
        console.print(paragraph(answerer.generate([question], max_tokens)[0]), soft_wrap=True)
        return
    from mm.media import ImageFacts
    from mm.model.images import generate_images

    drawn = generate_images(
        answerer.model,
        answerer.processor,
        answerer.tokenizers,
        [prompt] * pictures,
        guidance=guidance,
        sampling=Sampling(temperature, top_k, top_p, seed),
        size=ImageFacts(size, size),
    )
    save_pictures([picture.numpy() for picture in drawn], out)
    console.print(f"{out} holds {pictures} pictures and sheet.png", soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------- data


@app.command()
def index(
    card: Annotated[Path, typer.Argument(help="a data card, such as data_cards/demo/card.yaml")],
    split: Annotated[str, typer.Option(help="split of the card")] = "train",
    folder: Annotated[Path, typer.Option(help="where indexes are kept")] = Path("~/.cache/mm/index"),
    processes: Annotated[int, typer.Option(help="how many work in parallel; 0 is this one", min=0, max=1024)] = 0,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Index a split of a card: one pass over its shards that later runs share. Unreadable samples are listed."""
    from mm.data.index import index_card

    with in_sentences("mm index", folder.expanduser(), "Use fewer --processes, or smaller shards"):
        rows = index_card(load_card(card, cache, cache_folder), split, folder.expanduser(), processes)
    console.print(paragraph(rows.summary()), soft_wrap=True)


@data_app.command("build")
def build_shards(
    name: Annotated[
        str, typer.Argument(help="openclipart, image-folder, llava-json, mmc4, scenes, gcide, wordnet or python-docs")
    ],
    out: Annotated[Path, typer.Argument(help="folder for the shards and their card")],
    options: Annotated[list[str] | None, typer.Argument(help="of the builder: source=FOLDER …")] = None,
) -> None:
    """Write shards and a card from what you have."""
    from mm.data.sources import build

    given: dict[str, str] = {}
    for option in options or []:
        key, _, value = option.partition("=")
        given[key] = value
    advice = "A list in a .json file is read whole: write it as JSON lines, one record a line"
    with in_sentences(f"mm data build {name}", out, advice):
        built = build(name, out, **given)
    for split, samples in built.samples.items():
        console.print(f"{split}: {samples:,} samples")
    for line in built.skips.lines():
        console.print(f"left out: {line}", soft_wrap=True)
    console.print(f"{out} holds the shards and their card")


@data_app.command("tokenize")
def tokenize_data(
    card: Annotated[Path, typer.Argument(help="a data card")],
    tokenizer: Annotated[Path, typer.Option("--with", help="a tokenizer of media, as model.tokenizers names it")],
    split: Annotated[str, typer.Option(help="split of the card")] = "train",
    folder: Annotated[Path, typer.Option(help="where indexes and columns are kept")] = Path("~/.cache/mm/index"),
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="samples that are looked at together", min=1, max=MANY)] = 32,
    processes: Annotated[int, typer.Option(help="how many work in parallel; 0 is this one", min=0, max=1024)] = 0,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Write the codes of a tokenizer as a column beside a split's index: training reads them instead of the files.

    Repeated, it goes on with the shards that are missing.
    """
    from mm.data.index import index_card
    from mm.score.tokenize import tokenize

    rows = index_card(load_card(card, cache, cache_folder), split, folder.expanduser(), processes)
    device = device_named(device)
    found = tokenize(rows, configure.resolve(tokenizer), device, batch, processes)
    console.print(
        f"{rows.card.name}/{split}: {found.items:,} items in {rows.rows:,} samples are {found.codes:,} codes; "
        f"{found.broken:,} could not be decoded",
        soft_wrap=True,
    )


@data_app.command("score")
def score_data(
    card: Annotated[Path, typer.Argument(help="a data card")],
    scorer: Annotated[str, typer.Option("--with", help="class of what scores, such as mm.score.reference.ReferenceLM")],
    model: Annotated[str, typer.Option(help="a recipe to train in folds, or a run, checkpoint or export")],
    options: Annotated[list[str] | None, typer.Argument(help="of the scorer: folds=4 …")] = None,
    split: Annotated[str, typer.Option(help="split of the card")] = "train",
    folder: Annotated[Path, typer.Option(help="where indexes and columns are kept")] = Path("~/.cache/mm/index"),
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="samples that are looked at together", min=1, max=MANY)] = 32,
    processes: Annotated[int, typer.Option(help="how many score in parallel; 0 is this one", min=0, max=1024)] = 0,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Write what a model says of each sample as a column beside a split's index, training the model if need be.

    Repeated, it goes on with the training and the shards that are missing.
    """
    from mm.data.index import index_card
    from mm.score.passes import Scorer, score_index

    given = {
        name: configure.parse_yaml(value) for name, _, value in (option.partition("=") for option in options or [])
    }
    device = device_named(device)
    built = configure.build({"_target_": scorer, "model": model, "device": device, **given}, Scorer)
    rows = index_card(load_card(card, cache, cache_folder), split, folder.expanduser(), processes)
    built.prepare(rows)
    score_index(rows, built, batch, processes)
    console.print(paragraph(built.told(rows)), soft_wrap=True)


@data_app.command("bpe")
def train_tokenizer(
    cards: Annotated[list[Path], typer.Argument(help="data cards whose train splits hold the texts")],
    out: Annotated[Path, typer.Option(help="folder for tokenizer.json; the `tokenizer.path` of a recipe")],
    size: Annotated[int, typer.Option(help="number of ids, 257 or more", min=257, max=2**24)] = 1024,
    characters: Annotated[
        int, typer.Option(help="of each card at most, so that none outweighs the others", min=1, max=10**12)
    ] = 4_000_000,
) -> None:
    """Train a small byte-level BPE on the texts of some cards."""
    from itertools import chain

    from mm.data.card import Card
    from mm.tokenizers.bpe import save_bpe, texts_of, train_bpe

    texts = chain.from_iterable(texts_of(Card.load(card), characters) for card in cards)
    save_bpe(train_bpe(texts, size), out)
    console.print(f"{out} holds a tokenizer of {size:,} ids")


@data_app.command("show")
def show_sample(
    card: Annotated[Path, typer.Argument(help="a data card")],
    row: Annotated[int, typer.Argument(help="row of the split, from 0", min=0, max=10**12)],
    split: Annotated[str, typer.Option(help="split of the card")] = "train",
    folder: Annotated[Path, typer.Option(help="where indexes are kept")] = Path("~/.cache/mm/index"),
    save: Annotated[Path | None, typer.Option(help="folder to write the sample's media files to")] = None,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Show one sample of a card, part by part."""
    from mm import media
    from mm.data.index import index_card
    from mm.sample import MediaPart, Text

    rows = index_card(load_card(card, cache, cache_folder), split, folder.expanduser())
    if row >= rows.rows:
        raise typer.BadParameter(f"row {row} of {rows.rows}: the split {split!r} has rows 0 to {rows.rows - 1}")
    sample = rows.sample(row)
    where = f", row {row} of {rows.rows} in {sample.source}/{split}"
    console.print(styled((printable(sample.key), "bold"), where), soft_wrap=True)
    for number, part in enumerate(sample.parts):
        role = f"{part.role}: " if part.role else ""
        if isinstance(part, Text):
            console.print(f"{role}{part.text!r}" + ("" if part.loss else "  (no loss)"))
            continue
        assert isinstance(part, MediaPart)  # codes are in columns, not in shards
        console.print(f"{role}{part.modality.label} {media.facts(part)}, {len(part.data):,} bytes")
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            target = save / f"{row:06d}-{number}.{media.extension(part)}"
            target.write_bytes(part.data)
            console.print(f"  written to {target}")


@data_app.command("check")
def check_data(
    card: Annotated[Path, typer.Argument(help="a data card")],
    split: Annotated[str | None, typer.Option(help="one split only; without it all, and what they share")] = None,
    write: Annotated[bool, typer.Option("--write", help="put the measured statistics into the card's file")] = False,
    processes: Annotated[
        int | None, typer.Option(help="how many work in parallel; all cores, at most 16", min=0, max=1024)
    ] = None,
    near: Annotated[
        int, typer.Option(help="bits of 64 by which pictures that resemble each other differ", min=0, max=64)
    ] = 8,
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Verify a card: decode everything, find duplicates in and across splits, measure. Exit status 1 if it is wrong."""
    from mm.data.check import check_card
    from mm.data.statistics import as_yaml, merged, write_statistics

    report = check_card(load_card(card, cache, cache_folder), split, processes, near)
    for table in report.tables():
        console.print(table)
    statistics = merged(report.card, report.statistics)
    if not write:
        console.print(paragraph(as_yaml(statistics)), soft_wrap=True, end="")
        console.print("(--write puts these statistics into the card)")
    elif write_statistics(report.card.path, statistics):
        console.print(f"{card} has the new statistics; the comments that stood among the old ones are gone")
    else:
        console.print(f"{card} has the new statistics")
    wrong, notes = (sum(finding.wrong is kind for finding in report.findings) for kind in (True, False))
    verdict = ("sound", "green") if report.sound else (f"{wrong} wrong", "red")
    console.print(styled(verdict, f", {notes} to know"))
    raise typer.Exit(0 if report.sound else 1)


@data_app.command("drop")
def drop_samples(
    card: Annotated[Path, typer.Argument(help="a data card")],
    samples: Annotated[list[str] | None, typer.Argument(help="keys or rows; without any, those dropped so far")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="take them back in")] = False,
    split: Annotated[str, typer.Option(help="split of the card")] = "train",
    folder: Annotated[Path, typer.Option(help="where indexes are kept")] = Path("~/.cache/mm/index"),
    cache: CacheLimit = None,
    cache_folder: CacheFolder = CACHE_FOLDER,
) -> None:
    """Leave samples out of every new plan. A file beside the card lists them; shards stay as they are."""
    from mm.data.drops import drop, dropped_rows, drops_file
    from mm.data.index import index_card

    rows = index_card(load_card(card, cache, cache_folder), split, folder.expanduser())
    changed = drop(rows, samples, undo) if samples else dropped_rows(rows).nonzero()[0].tolist()
    for row in changed:
        console.print(f"{printable(rows.key[row].as_py())}, row {row}")
    done = ("taken back in" if undo else "dropped") if samples else "dropped so far"
    left_out = int(dropped_rows(rows).sum())
    console.print(f"{len(changed):,} {done}; {left_out:,} of {rows.rows:,} are left out by {drops_file(rows.card)}")


# -------------------------------------------------------------------------------------------------------------- allow

Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="MODULE", help="a module of your own that the recipe may import (repeatable)"),
]


def _allowing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option ``--allow``."""

    @functools.wraps(command)
    def run(*arguments: Any, _allow: list[str] | None = None, **options: Any) -> Any:
        allow(_allow or [])
        return command(*arguments, **options)

    own = signature(command, eval_str=True)
    option = Parameter("_allow", Parameter.KEYWORD_ONLY, default=None, annotation=Allow)
    vars(run)["__signature__"] = own.replace(parameters=[*own.parameters.values(), option])
    run.__annotations__ = {name: one.annotation for name, one in own.parameters.items()} | {"_allow": Allow}
    return run


def _allow_everywhere(commands: typer.Typer) -> None:
    """Every command may build what a recipe names, so every one has ``--allow``."""
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _allow_everywhere(group.typer_instance)
    for command in [*commands.registered_commands, commands.registered_callback]:
        if command is not None and command.callback is not None:
            command.callback = _allowing(command.callback)


_allow_everywhere(app)


def main() -> None:
    """Entry point. Mistakes in a recipe or its data are a sentence and exit status 2, not a traceback.

    What memory, a disk or permissions stopped is a sentence and exit status 1, see `mm.data.failures`.
    """
    terminal.replace_what_cannot_be_encoded()
    try:
        app()
    except Exception as error:
        if not _speaks_for_itself(error):
            errors.print(paragraph(traceback.format_exc(), indent="  "), soft_wrap=True)
            raise SystemExit(1) from None
        errors.print(styled((type(error).__name__, "red")), paragraph(str(error), indent="  "), soft_wrap=True)
        raise SystemExit(1 if isinstance(error, Stopped) else 2) from None


def _speaks_for_itself(error: Exception) -> bool:
    """Whether the suite raised it on purpose: its message says what to do, and a traceback would hide that."""
    on_purpose = isinstance(error, ValueError | RuntimeError) and type(error).__module__.partition(".")[0] == "mm"
    return on_purpose or isinstance(error, FileNotFoundError)
