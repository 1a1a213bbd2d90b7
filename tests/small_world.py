"""A small world for tests of the whole: sources of every modality, a byte tokenizer, a tiny model, recipes to run.

Everything is drawn from fixed seeds, so that two tests, or two processes, that write it get the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from PIL import Image as PillowImage
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from mm.model.multimodal import DecoderOptions, ModelOptions, MultimodalLM, build_model
from mm.tokenizers.templates import CHATML
from mm.train.loop import train
from mm.train.recipe import Recipe
from tests.shard_files import as_json, write_card, write_tar

WORDS = ("one", "two", "red", "blue", "cat", "dog", "on", "under", "the", "a", "sees", "hears", "mat", "hat")

ENCODERS: dict[str, dict[str, Any]] = {
    "image": {
        "_target_": "mm.encoders.vision.TimmEncoder",
        "name": "test_vit",
        "pretrained": False,
        "image_size": 32,
        "layer": 0,
        "adapter": {"_target_": "mm.encoders.adapters.MLP"},
    },
    "speech": {
        "_target_": "mm.encoders.speech.WhisperEncoder",
        "width": 32,
        "depth": 1,
        "heads": 2,
        "mels": 80,
        "pad_to_30s": False,
        "adapter": {"_target_": "mm.encoders.adapters.ConvSubsample", "convolutions": 2, "bottleneck": 16},
    },
    "point": {
        "_target_": "mm.encoders.point.PointGroupEncoder",
        "points": 24,
        "groups": 4,
        "neighbours": 4,
        "depth": 1,
        "width": 32,
        "heads": 2,
        "adapter": {"_target_": "mm.encoders.adapters.MLP"},
    },
}
"""One small encoder a modality, from scratch."""

DECODER = {"vocabulary": 259, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}


# -------------------------------------------------------------------------------------------------------------- media


def picture(seed: int, width: int = 24, height: int = 20) -> bytes:
    """A PNG of noise: exact, unlike a JPEG, whatever the version of the library."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    PillowImage.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def broken_picture(seed: int) -> bytes:
    """A PNG with a sound header and half of its pixels."""
    whole = picture(seed)
    return whole[: len(whole) // 2]


def recording(seed: int, frames: int = 4000) -> bytes:
    """A WAV of noise at 16 kHz."""
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, frames)
    stream = io.BytesIO()
    soundfile.write(stream, samples, 16_000, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def cloud(seed: int, points: int = 40) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(seed).normal(size=(points, 3)).astype(np.float32))
    return stream.getvalue()


def words(seed: int, most: int = 8) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, draw.integers(2, most)))


# ------------------------------------------------------------------------------------------------------------- corpus

Members = list[tuple[str, bytes]]

FORMS: dict[str, Any] = {
    "pairs": [{"image": "png"}, {"text": "txt"}],
    "speech": [{"speech": "wav"}, {"text": "txt"}],
    "points": [{"point": "npy"}, {"text": "txt"}],
    "pages": [
        {"text": {"from": "0.txt", "loss": False}},
        {"image": "1.png"},
        {"image": "2.png"},
        {"text": "3.txt"},
        {"image": "4.png"},
    ],
    "chats": {"chat": "json", "images": "png"},
    "text": [{"text": "txt"}],
}
"""How a record of each source becomes a sample."""


def record(source: str, seed: int) -> Members:
    """Extensions and contents of one record."""
    text = words(seed).encode()
    if source == "pairs":
        return [("png", picture(seed)), ("txt", text)]
    if source == "speech":
        return [("wav", recording(seed, 2000 + 400 * (seed % 5))), ("txt", text)]
    if source == "points":
        return [("npy", cloud(seed, 20 + seed % 9)), ("txt", text)]
    if source == "pages":
        pictures = [picture(3 * seed + number) for number in range(3)]
        return [
            ("0.txt", text),
            ("1.png", pictures[0]),
            ("2.png", pictures[1]),
            ("3.txt", words(seed + 1).encode()),
            ("4.png", pictures[2]),
        ]
    if source == "chats":
        turns = [
            {"from": "human", "value": f"<image>\nWhat {words(seed, 4)}?"},
            {"from": "gpt", "value": words(seed + 1, 4)},
        ]
        return [("json", as_json(turns)), ("png", picture(seed))]
    return [("txt", words(seed, 16).encode())]


def write_source(folder: Path, source: str, rows: int, shards: int = 2, broken: Sequence[int] = ()) -> Path:
    """A card with its shards; returns the card's path. The pictures of the rows `broken` have no end."""
    paths = []
    per_shard = rows // shards
    first = 10_000 * list(FORMS).index(source)
    for shard in range(shards):
        members = []
        for row in range(shard * per_shard, (shard + 1) * per_shard):
            for extension, data in record(source, first + row):
                spoiled = row in broken and extension.endswith("png")
                members.append((f"{row:06d}.{extension}", broken_picture(first + row) if spoiled else data))
        paths.append(write_tar(folder / f"{source}-{shard}.tar", members).name)
    return write_card(folder, paths, FORMS[source], name=source)


# ---------------------------------------------------------------------------------------------------- tokenizer, model


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer whose ids are bytes, with three special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    return folder


def tiny_model(encoders: Sequence[str] = tuple(ENCODERS), *, meta: bool = False, **changes: Any) -> MultimodalLM:
    """Encoders and a decoder of two layers, with the same decoder weights every time; `changes` are of the decoder."""
    torch.manual_seed(1)
    options = ModelOptions(DecoderOptions(config=DECODER | changes), {name: ENCODERS[name] for name in encoders})
    return build_model(options, meta=meta)


def bytes_kept(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a computation gives, and the bytes that stay allocated for it: the result and what its backward needs.

    Allocations are counted, and not what autograd's hooks see: activation checkpointing keeps tensors of its own.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = compute()
    return result, sum(event.self_cpu_memory_usage for event in profiler.events() or ())


# ----------------------------------------------------------------------------------------------------------- training

SOURCES = tuple(FORMS)


def write_recipe(
    folder: Path, cards: dict[str, Path], tokenizer: Path, sources: Sequence[str] = SOURCES, **changes: Any
) -> Path:
    """A recipe over some sources that trains in fp32 at a constant rate, so that runs of any length begin alike."""
    recipe = {
        "name": "tiny",
        "run": str(folder / "run"),
        "seed": 3,
        "steps": 10,
        "model": {"decoder": {"config": DECODER}, "encoders": ENCODERS},
        "tokenizer": {"path": str(tokenizer)},
        "data": {
            "sources": {name: {"card": str(cards[name])} for name in sources},
            "validation": {"held_out": {"card": str(cards["held_out"])}},
            "index": str(cards["text"].parent / "cache"),
            "workers": 0,
        },
        "packing": {"capacity": 128, "batch": 4, "window": 32},
        "precision": "fp32",
        "optim": {"lr": 2e-3},
        "schedule": {"kind": "constant", "warmup": 0},
        "log_every": 1,
        "keep": 100,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def losses(run: Path, figure: str = "loss") -> dict[int, float]:
    """A figure by step, from the run's ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line[figure] for line in lines if figure in line}


def seen(run: Path) -> dict[int, list[str]]:
    """Digests of the packs of every step, over all ranks."""
    steps: dict[int, list[str]] = {}
    for path in (run / "seen").glob("rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["packs"])
    return {step: sorted(packs) for step, packs in sorted(steps.items())}


def train_here(recipe: Path, *changes: str) -> Path:
    """Train in this process, on one thread as `train_apart` does; returns the run folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded = Recipe.load(recipe, changes)
        train(loaded)
        return loaded.folder
    finally:
        torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    """Of processes that compute as this one does: on one thread, from this source tree."""
    path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}


def train_apart(recipe: Path, *changes: str) -> subprocess.Popen[str]:
    """A process that trains."""
    return subprocess.Popen(
        [sys.executable, "-m", "mm", "train", str(recipe), *changes],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


ONE_AFTER_ANOTHER = """
import json, os, sys
from pathlib import Path
from mm.train.loop import train
from mm.train.recipe import Recipe

if __name__ == "__main__":
    # A store of its own for every run: in the launcher's a process would find addresses of the run before.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for port, recipe, *changes in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        train(Recipe.load(recipe, changes))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_together(folder: Path, processes: int, runs: Sequence[Sequence[str]], timeout: float = 600) -> None:
    """Runs ``(recipe, *changes)``, one after another, on several processes under torchrun.

    Raises:
        subprocess.TimeoutExpired: some process waits for another.
    """
    script = folder / "one_after_another.py"
    script.write_text(ONE_AFTER_ANOTHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started = subprocess.Popen(
        [*launcher, str(script), json.dumps([[free_port(), *run] for run in runs])],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.terminate()  # a killed launcher would leave its processes behind
        started.communicate()
        raise
    assert started.returncode == 0, output[-8000:]


def fork_run(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when it had saved this step; its metrics go on beyond, as those of a killed run do."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy
