"""What `mm train` reaches on this machine: tokens a second, share of the peak, and memory beside `mm estimate`.

    the demo's drawings ─▶ plan, workers, packs of 4096 ─▶ ViT-B + decoder of 0.6B, both trained, AdamW ─▶ metrics.jsonl

Every variant is a run of its own of the same steps; figures are those that the run itself reports, from the second half
of its steps; `rest` is all the time beside steps, to the checkpoint at the end. Weights are
random and words are bytes, so nothing has to be fetched.

    python -m benchmarks.loop                                    the size that is meant for a GPU of 80 GB
    python -m benchmarks.loop --quick --variants plain recomputed      small, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mm.train.footprint import footprint
from mm.train.recipe import Recipe

VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "compiled": ("parallel.compile=true",),
    "products kept": ("parallel.activations=selective",),
    "recomputed": ("parallel.activations=full",),
    "compiled, recomputed": ("parallel.compile=true", "parallel.activations=full"),
    "4t4i": ("model.decoder.config.experts={groups: {text: 4, image: 4}}",),
}

SIZES: dict[bool, dict[str, Any]] = {
    False: {"vocabulary": 32768, "width": 1536, "layers": 20, "heads": 12, "kv_heads": 6, "head_dim": 128, "ffn": 4096},
    True: {"vocabulary": 320, "width": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 128},
}
"""Of the decoder, by whether it is to be quick."""

TOWERS = {False: ("vit_base_patch16_siglip_224", 224), True: ("test_vit", 160)}


def write_tokenizer(folder: Path) -> None:
    """Bytes, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def recipe(folder: Path, quick: bool, steps: int, micro_batch: int, workers: int) -> dict[str, Any]:
    name, side = TOWERS[quick]
    encoder = {
        "_target_": "mm.encoders.vision.TimmEncoder",
        "name": name,
        "pretrained": False,
        "image_size": side,
        "adapter": {"_target_": "mm.encoders.adapters.MLP"},
    }
    return {
        "name": "loop",
        "run": str(folder / "run"),
        "steps": steps,
        "model": {"decoder": {"config": SIZES[quick]}, "encoders": {"image": encoder}},
        "tokenizer": {"path": str(folder / "bytes")},
        "data": {
            "sources": {"demo": {"card": "data_cards/demo/card.yaml"}},
            "index": str(folder / "index"),
            "workers": workers,
        },
        "packing": {"capacity": 4096 if not quick else 512, "batch": 2 * micro_batch, "window": 64},
        "micro_batch": micro_batch,
        "optim": {"lr": 1e-4},
        "schedule": {"kind": "constant", "warmup": 0},
        "log_every": -(-steps // 2),
        "log_to": [],
        "keep": 1,
    }


def run(path: Path, folder: Path, name: str) -> dict[str, float]:
    """The figures of the second half of a run."""
    place = folder / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "mm", "train", str(path), f"run={place}", *VARIANTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    figures = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(place)  # its checkpoint holds the optimizer too
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=2, help="packs")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(folder / "bytes")
        path = folder / "recipe.yaml"
        made = recipe(folder, options.quick, options.steps, options.micro_batch, options.workers)
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        print(f"{options.micro_batch} packs of {made['packing']['capacity']} tokens a micro-step, 2 a step")
        print(
            f"{'':22}{'tokens/s':>10}{'of peak':>9}{'of first':>10}{'memory':>9}{'estimate':>10}{'data':>7}{'rest':>8}"
        )
        speeds: dict[str, float] = {}
        for name in options.variants:
            began = time.monotonic()
            figures = run(path, folder, name)
            seconds = time.monotonic() - began - options.steps * figures["seconds_per_step"]
            speeds[name] = figures["tokens_per_second"]
            share = figures.get("mfu", figures.get("mfu_of_measured", 0.0))
            estimated = footprint(Recipe.load(path, VARIANTS[name]), 1).total
            ratio = speeds[name] / next(iter(speeds.values()))
            print(
                f"{name:22}{speeds[name]:10,.0f}{share:9.1%}{ratio:10.2f}{figures['memory/peak'] / 1e9:7.1f}GB"
                f"{estimated / 1e9:8.1f}GB{figures['time/data']:7.1%}{seconds:7.0f}s",
                flush=True,
            )


if __name__ == "__main__":
    main()
