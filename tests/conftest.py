"""A small world for tests of the whole: a corpus of every modality, a byte tokenizer, a tiny model, recipes to run.

Everything is drawn from fixed seeds, so that two tests, or two processes, that write it get the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image as PillowImage
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mm.configure import build
from mm.encoders.base import Encoder
from mm.model.multimodal import ModelOptions, MultimodalLM, build_model
from mm.tokenizers.text import CHATML, TextTokenizer
from mm.train.recipe import Recipe
from tests.shard_files import as_json, write_card, write_tar

WORDS = ("one", "two", "red", "blue", "cat", "dog", "on", "under", "the", "a", "sees", "hears", "mat", "hat")

ENCODERS: dict[str, dict[str, Any]] = {
    "image": {
        "_target_": "mm.encoders.vision.TimmEncoder",
        "name": "test_vit",
        "pretrained": False,
        "image_size": 32,
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Card of every source, and of a held-out one, by name."""
    folder = tmp_path_factory.mktemp("corpus")
    cards = {source: write_source(folder, source, rows=24) for source in FORMS}
    held_out = folder / "held_out"
    held_out.mkdir()
    return cards | {"held_out": write_source(held_out, "pages", rows=5, shards=1)}


# ---------------------------------------------------------------------------------------------------- tokenizer, model


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose ids are bytes, with three special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(str(tokenizer_folder))


@pytest.fixture
def tiny_model() -> MultimodalLM:
    """All encoders and a decoder of two layers, with the same weights in every test."""
    return tiny(ENCODERS)


def tiny(encoders: Mapping[str, dict[str, Any]]) -> MultimodalLM:
    torch.manual_seed(1)
    options = build({"_target_": "tests.conftest.Options", "encoders": dict(encoders)}, ModelOptions)
    return build_model(options)


# ----------------------------------------------------------------------------------------------------------- training

