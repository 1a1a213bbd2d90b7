"""Packed training against Hugging Face's Llava on the same samples: useful tokens a second, and memory.

    packed            our `MultimodalLM` on packs of 1024 tokens
    random batches    `LlavaForConditionalGeneration` on right-padded batches of 8 random samples
    length-grouped    the same on batches of 8 that transformers' sampler of like lengths makes
    Trainer           the random batches in transformers' `Trainer`
    fixed length      random batches padded to 1024 tokens whatever they hold, as nanoVLM's collator pads
    packed, FSDP2     packed, every block sharded by FSDP2 over one process

All start from the same weights, which is checked: on the same samples the losses agree to 1e-4. A step is forward,
backward and an update of every parameter by fused AdamW in float32; making the batches is not timed. Useful tokens are
those of samples, media slots included. Samples are those of `benchmarks.lengths` a quarter as long; a picture of
any resolution is so many tiles of one size.

The arms take turns, so that a busy machine slows all of them. Every arm works through all samples once; each turn holds
an equal part of its batches, large and small alike. The ratio is of all turns together, which hold exactly the same
samples; smallest and largest are of single turns, whose samples are alike but not the same.

    python -m benchmarks.train            all tables
    python -m benchmarks.train --others   Trainer, fixed length and FSDP2 only
    python -m benchmarks.train --quick    small sizes, to see that it runs
    python -m benchmarks.train --gpu      a model of 0.4 billion in bf16, lengths not divided: ours as `mm train` shards
                                          it, the other under autocast, as `Trainer(bf16=True)` runs it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils.logging import disable_progress_bar

from benchmarks.lengths import IMAGE_TOKENS, INTERLEAVED, Lengths, mixed_lengths
from mm.model.hub import save_decoder
from mm.model.multimodal import DecoderOptions, ModelOptions, MultimodalLM, build_model
from mm.packing.batch import IGNORE, Batch
from mm.packing.collate import Document, Item, Processor
from mm.packing.fit import first_fit_decreasing
from mm.sample import Modality
from mm.tokenizers.text import TextTokenizer
from mm.train.parallel import ParallelOptions, World, join_world, parallelise

BATCH = 8  # samples in a padded batch
MEGABATCHES = 50  # batches that transformers sorts together, its default for any large data set
HEAVIEST = 2  # batches that are run to find the peak of memory
TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------- the same model twice


@dataclass(frozen=True)
class Sizes:
    """Sizes of both models: a Llama decoder, a CLIP tower, and a projector of two layers between.

    The last id of the vocabulary stands for an image in Hugging Face's model; text never holds it.
    """

    vocabulary: int = 8192
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    tower_width: int = 128
    tower_layers: int = 4
    side: int = 6  # patches a side of an image
    patch: int = 8  # pixels
    scale: int = 4  # lengths of the mixture are divided by this
    device: str = "cpu"

    @property
    def image_tokens(self) -> int:
        return self.side**2

    @property
    def image_id(self) -> int:
        return self.vocabulary - 1

    @property
    def decoder(self) -> dict[str, Any]:
        """Fields of our `DecoderConfig`."""
        shape = {"vocabulary": self.vocabulary, "width": self.width, "layers": self.layers, "ffn": 3 * self.width}
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.width // self.heads}
        return {**shape, **heads, "context": 4096 // self.scale}

    @property
    def tower(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.tower_width,
            intermediate_size=4 * self.tower_width,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_width // 32,
            image_size=self.side * self.patch,
            patch_size=self.patch,
        )


def build_ours(sizes: Sizes, folder: Path) -> MultimodalLM:
    """Our model from fixed seeds. Its tower comes from a checkpoint that transformers wrote into `folder`."""
    torch.manual_seed(0)
    pixels = sizes.side * sizes.patch
    CLIPVisionModel(sizes.tower).save_pretrained(folder / "tower")
    image_processor = CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    image_processor.save_pretrained(folder / "tower")
    encoder = {
        "_target_": "mm.encoders.vision.TransformersVisionEncoder",
        "name_or_folder": str(folder / "tower"),
        "adapter": {"_target_": "mm.encoders.adapters.MLP"},
    }
    return build_model(ModelOptions(DecoderOptions(config=sizes.decoder), {"image": encoder})).train()


def build_theirs(sizes: Sizes, ours: MultimodalLM, folder: Path) -> LlavaForConditionalGeneration:
    """Hugging Face's model with our weights; the decoder's go through the checkpoint that we export."""
    save_decoder(ours.decoder, folder / "decoder")
    language = AutoModelForCausalLM.from_pretrained(folder / "decoder", trust_remote_code=False)
    config = LlavaConfig(
        vision_config=sizes.tower,
        text_config=language.config,
        image_token_index=sizes.image_id,
        image_seq_length=sizes.image_tokens,
        vision_feature_layer=-1,  # the default, -2, computes a last layer in vain
    )
    theirs = LlavaForConditionalGeneration(config)
    theirs.model.language_model.load_state_dict(language.model.state_dict())
    theirs.lm_head.load_state_dict(language.lm_head.state_dict())
    encoder: Any = ours.encoders["image"]
    adapter: Any = ours.adapters["image"]
    projector: Any = theirs.model.multi_modal_projector
    theirs.model.vision_tower.load_state_dict(encoder.tower.model.state_dict())
    first, _, second = adapter.feed_forward
    projector.linear_1.load_state_dict(first.state_dict())
    projector.linear_2.load_state_dict(second.state_dict())
    return theirs.train()


# ---------------------------------------------------------------------------------------------- the same samples, twice


def make_documents(lengths: Lengths, sizes: Sizes, seed: int = 0) -> list[Document]:
    """Documents of noise with the lengths of the mixture over `scale`. The images of a page stand between its text."""
    random = np.random.default_rng(seed)
    capacity = sizes.decoder["context"]
    documents = []
    for image_tokens, text_tokens, kind in zip(lengths.image_tokens, lengths.text_tokens, lengths.kind, strict=True):
        images = round(int(image_tokens) / IMAGE_TOKENS)
        text = min(max(2, int(text_tokens) // sizes.scale), capacity - images * sizes.image_tokens)
        gaps = images + 1 if kind == INTERLEAVED else 1  # elsewhere all text follows the images
        stretches = [len(part) for part in np.array_split(np.arange(text), gaps)]
        documents.append(make_document([0] * (images + 1 - gaps) + stretches, sizes, random))
    return documents


def make_document(stretches: Sequence[int], sizes: Sizes, random: np.random.Generator) -> Document:
    """A document with so many text tokens before, between and after its images."""
    tokens, modality, items = [], [], []
    start = 0
    for number, text in enumerate(stretches):
        if number:
            pixels = random.integers(0, 256, (sizes.side * sizes.patch, sizes.side * sizes.patch, 3), np.uint8)
            grid = (sizes.side, sizes.side)
            items.append(Item(Modality.IMAGE, torch.from_numpy(pixels), grid, start, sizes.image_tokens))
            tokens.append(np.zeros(sizes.image_tokens, np.int64))
            modality.append(np.full(sizes.image_tokens, Modality.IMAGE, np.int8))
            start += sizes.image_tokens
        tokens.append(random.integers(0, sizes.image_id, text))
        modality.append(np.full(text, Modality.TEXT, np.int8))
        start += text
    kinds = np.concatenate(modality)
    weights = (kinds == Modality.TEXT).astype(np.float32)
    return Document(np.concatenate(tokens), weights, kinds, tuple(items))


def byte_tokenizer() -> TextTokenizer:
    """A tokenizer whose ids are bytes, with one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return TextTokenizer(tokenizer.to_str(), {"eos_token": "<|end|>"})


def pack(documents: Sequence[Document], model: MultimodalLM) -> Batch:
    """The documents as one pack."""
    rows = [(0, 0, number) for number in range(len(documents))]
    return Processor(byte_tokenizer(), model.entrances).collate([documents], [rows])


def pad(documents: Sequence[Document], sizes: Sizes, model: MultimodalLM, length: int = 0) -> dict[str, Tensor]:
    """The documents as arguments of Hugging Face's forward: padded on the right, pixels normalised as ours are.

    Args:
        length: pad to this length, if it is longer than the longest document.
    """
    shape = len(documents), max(length, *map(len, documents))
    tokens, attention = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    for row, document in enumerate(documents):
        text, is_image = torch.from_numpy(document.tokens), torch.from_numpy(document.modality == Modality.IMAGE)
        tokens[row, : len(document)] = text.masked_fill(is_image, sizes.image_id)
        labels[row, : len(document)] = text.masked_fill(is_image, IGNORE)
        attention[row, : len(document)] = 1
    arguments = {"input_ids": tokens, "attention_mask": attention, "labels": labels}
    if pictures := [item.prepared for document in documents for item in document.items]:
        encoder: Any = model.encoders["image"]
        arguments["pixel_values"] = encoder.normalise(torch.stack(pictures)).contiguous()
    return arguments


def on_gpu(arguments: Any) -> Any:
    """A batch of either model there."""
    if isinstance(arguments, Batch):
        return arguments.to(torch.device("cuda"))
    return {name: tensor.cuda() for name, tensor in arguments.items()}


def our_loss(model: MultimodalLM, batch: Batch) -> Tensor:
    """() mean loss over the labels of a batch."""
    return model(batch).total / batch.weights.sum()


def their_loss(model: LlavaForConditionalGeneration, arguments: dict[str, Tensor]) -> Tensor:
    return model(**arguments, use_cache=False).loss


def their_loss_in_bf16(model: LlavaForConditionalGeneration, arguments: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return their_loss(model, arguments)


# ------------------------------------------------------------------------------------------------------------ the arms


class Load(NamedTuple):
    """One batch: what the loss takes, its useful tokens, and the tokens that decoder and tower compute for it."""

    inputs: Any
    useful: int
    computed: int


class Arm:
    """A model with its own optimizer, and the batches that it works through."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor], loads: list[Load]) -> None:
        self.model, self.loss, self.loads = model, loss, loads
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, load: Load) -> None:
        self.loss(self.model, load.inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, loads: Sequence[Load]) -> float:
        """Seconds for some batches."""
        start = time.perf_counter()
        for load in loads:
            self.step(load)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def heaviest_first(self) -> list[Load]:
        return sorted(self.loads, key=lambda load: -load.computed)

    def dealt(self, turns: int) -> list[list[Load]]:
        """The batches in equal parts, each with heavy and light ones: dealt by weight, there and back again."""
        parts: list[list[Load]] = [[] for _ in range(turns)]
        for number, load in enumerate(self.heaviest_first()):
            around, place = divmod(number, turns)
            parts[turns - 1 - place if around % 2 else place].append(load)
        return parts


def packed_arm(documents: Sequence[Document], capacity: int, ours: MultimodalLM) -> Arm:
    packs = first_fit_decreasing(np.array([len(document) for document in documents]), capacity)
    loads = []
    for start, stop in zip(packs.starts[:-1], packs.starts[1:], strict=True):
        chosen = [documents[number] for number in packs.order[start:stop]]
        tokens = sum(map(len, chosen))
        loads.append(Load(pack(chosen, ours), tokens, tokens + _image_tokens(chosen)))
    return Arm(ours, our_loss, loads)


def padded_arm(
    documents: Sequence[Document],
    order: Sequence[int],
    sizes: Sizes,
    ours: MultimodalLM,
    folder: Path,
    length: int = 0,
) -> Arm:
    """Batches padded to their longest sample, or to a length."""
    loads = []
    for start in range(0, len(order), BATCH):
        chosen = [documents[number] for number in order[start : start + BATCH]]
        inputs = pad(chosen, sizes, ours, length)
        loads.append(Load(inputs, sum(map(len, chosen)), inputs["input_ids"].numel() + _image_tokens(chosen)))
    return Arm(build_theirs(sizes, ours, folder), their_loss, loads)


def _image_tokens(documents: Sequence[Document]) -> int:
    return sum(item.length for document in documents for item in document.items)


class TrainerArm(Arm):
    """Batches of another arm in transformers' `Trainer`, with the same optimizer and without logging and saving."""

    def __init__(self, other: Arm, folder: Path) -> None:
        self.model, self.loads, self.optimizer = other.model, other.loads, other.optimizer
        self.folder = folder

    def step(self, load: Load) -> None:
        self.run([load])

    def run(self, loads: Sequence[Load]) -> float:
        from transformers import PrinterCallback, Trainer, TrainingArguments  # import DeepSpeed, which prints

        options = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=1,  # of batches: they are made already
            max_steps=len(loads),
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        inputs: Any = [load.inputs for load in loads]
        trainer = Trainer(
            self.model,
            options,
            data_collator=lambda batches: batches[0],
            train_dataset=inputs,
            optimizers=(self.optimizer, torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def sharded(ours: MultimodalLM) -> MultimodalLM:
    """Our model with every block sharded over the one process of the process group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for module in (*ours.blocks(), ours):
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.contiguous()
        fully_shard(module)
    return ours


ARMS = ("packed", "random batches", "length-grouped")
OTHERS = ("packed", "packed, FSDP2", "Trainer", "fixed length")


def make_arm(name: str, documents: Sequence[Document], capacity: int, sizes: Sizes, folder: Path) -> Arm:
    """One of `ARMS` or `OTHERS`."""
    arm = make_arm_on_cpu(name, documents, capacity, sizes, folder)
    if sizes.device == "cpu":
        return arm
    loss = our_loss if name.startswith("packed") else their_loss_in_bf16
    if name.startswith("packed"):
        assert isinstance(arm.model, MultimodalLM)
        parallelise(arm.model, the_world(), torch.bfloat16, ParallelOptions())
    return Arm(arm.model.cuda(), loss, [load._replace(inputs=on_gpu(load.inputs)) for load in arm.loads])


STAYS = ExitStack()


@cache
def the_world() -> World:
    """Of this process, which stays to its end."""
    return STAYS.enter_context(join_world())


def make_arm_on_cpu(name: str, documents: Sequence[Document], capacity: int, sizes: Sizes, folder: Path) -> Arm:
    ours = build_ours(sizes, folder)
    if name.startswith("packed"):
        return packed_arm(documents, capacity, sharded(ours) if "FSDP2" in name else ours)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(documents), generator=generator).tolist()
    if name == "Trainer":
        return TrainerArm(padded_arm(documents, order, sizes, ours, folder), folder)
    if name == "fixed length":
        return padded_arm(documents, order, sizes, ours, folder, capacity)
    if name == "length-grouped":
        lengths = [len(document) for document in documents]
        order = get_length_grouped_indices(lengths, BATCH, mega_batch_mult=MEGABATCHES, generator=generator)
    return padded_arm(documents, order, sizes, ours, folder)


# --------------------------------------------------------------------------------------------------------- measurements


def check_equal_losses(documents: Sequence[Document], sizes: Sizes, folder: Path) -> None:
    """Stops the benchmark where the two models do not compute the same loss of the same samples."""
    ours = build_ours(sizes, folder)
    theirs = build_theirs(sizes, ours, folder)
    packed, padded = pack(documents, ours), pad(documents, sizes, ours)
    if sizes.device == "cuda":
        ours, theirs, packed, padded = ours.to("cuda"), theirs.to("cuda"), on_gpu(packed), on_gpu(padded)
    with torch.no_grad():
        our, their = float(our_loss(ours, packed)), float(their_loss(theirs, padded))
    if abs(our - their) > TOLERANCE:
        raise SystemExit(f"the two models differ: loss {our:.6f} packed and {their:.6f} padded, of the same samples")
    print(f"\nThe same {len(documents)} samples give loss {our:.6f} packed and {their:.6f} padded")


def compare_speed(
    title: str, names: Sequence[str], documents: Sequence[Document], capacity: int, turns: int, sizes: Sizes
) -> None:
    """Prints useful tokens a second of each arm and our ratio to the others, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: make_arm(name, documents, capacity, sizes, Path(folder)) for name in names}
    for arm in arms.values():
        arm.step(arm.heaviest_first()[-1])
    parts = {name: arm.dealt(turns) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    extra = dict.fromkeys(names, 0.0)
    for turn in range(turns):
        for shift in range(len(names)):
            name = names[(turn + shift) % len(names)]
            held = _reset_peak()
            seconds[name].append(arms[name].run(parts[name][turn]))
            extra[name] = max(extra[name], _peak() - held)
    useful = sum(map(len, documents))
    print(f"\n{title}: {len(documents)} samples, {useful} useful tokens, {turns} turns")
    speeds = {
        name: [
            sum(load.useful for load in part) / lasted for part, lasted in zip(parts[name], seconds[name], strict=True)
        ]
        for name in names
    }
    for name, arm in arms.items():
        computed = sum(load.computed for load in arm.loads) / (useful + _image_tokens(documents))
        ratios = [our / their for our, their in zip(speeds["packed"], speeds[name], strict=True)]
        print(
            f"  {name:16} {len(arm.loads):3} steps, {computed:4.2f} × the tokens, "
            f"{useful / sum(seconds[name]):7.0f} useful tokens/s   packed is "
            f"{sum(seconds[name]) / sum(seconds['packed']):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
            f"{f', {extra[name]:.0f} MiB beside weights and moments' if sizes.device == 'cuda' else ''}"
        )


def compare_others(documents: Sequence[Document], capacity: int, turns: int, sizes: Sizes) -> None:
    """Prints the speed of `OTHERS`."""
    others = [name for name in OTHERS if name != "Trainer" or find_spec("accelerate")]
    if others != list(OTHERS):
        print("\nTrainer is left out: it needs `pip install accelerate`")
    compare_speed("Mixed lengths, other ways", others, documents, capacity, turns, sizes)


def measure_memory(arm: Arm) -> dict[str, float]:
    """High-water marks of this process in MiB: after the lightest step, and after the heaviest."""
    loads = arm.heaviest_first()
    arm.step(loads[-1])  # loads the libraries' code; optimizer state and gradients exist
    before = _peak()
    for load in loads[:HEAVIEST]:
        arm.step(load)
    return {"peak_mib": _peak(), "extra_mib": _peak() - before}


def compare_memory(arguments: list[str]) -> None:
    """Prints the peak of each arm, each in a process of its own."""
    print(f"\nMemory, each arm in a process of its own, at its {HEAVIEST} heaviest batches")
    measured: dict[str, dict[str, float]] = {}
    for name in ARMS:
        command = [sys.executable, "-m", "benchmarks.train", *arguments, "--memory", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[name] = json.loads(output.splitlines()[-1])  # libraries that transformers imports print, too
    ours = measured["packed"]
    for name, marks in measured.items():
        peak, extra = marks["peak_mib"], marks["extra_mib"]
        print(
            f"  {name:16} peak {peak:6.0f} MiB, {extra:6.0f} MiB of it above the lightest step; "
            f"packed / this {ours['peak_mib'] / peak:.2f} and {ours['extra_mib'] / extra:.2f}"
        )


def _reset_peak() -> float:
    """MiB that are held now, from which on a GPU counts."""
    if not torch.cuda.is_initialized():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def _peak() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ------------------------------------------------------------------------------------------------------------- the run


class Mode(NamedTuple):
    """samples: of the mixture; captions: of the uniform set; turns: in which the arms alternate"""

    sizes: Sizes
    samples: int
    captions: int
    turns: int


FULL = Mode(Sizes(), samples=400, captions=160, turns=10)
GPU = Mode(
    Sizes(32768, 1024, 16, 16, 8, tower_width=768, tower_layers=12, side=12, patch=14, scale=1, device="cuda"),
    samples=320,
    captions=160,
    turns=5,
)
QUICK = Mode(Sizes(vocabulary=2048, width=128, layers=2, tower_width=64, tower_layers=1), 64, 48, turns=3)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, its ratios say little")
    parser.add_argument("--gpu", action="store_true", help="a larger model, on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", choices=ARMS, help="only print the peak memory of this arm, as JSON")
    parser.add_argument("--others", action="store_true", help="only the table of other ways to train")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    sizes, samples, captions, turns = GPU if options.gpu else QUICK if options.quick else FULL
    capacity = sizes.decoder["context"]
    mixture = make_documents(mixed_lengths(samples), sizes)
    if options.memory:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_memory(make_arm(options.memory, mixture, capacity, sizes, Path(folder)))))
        return
    if not options.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{sizes}, {'bf16' if options.gpu else 'float32'}, {options.threads} threads", flush=True)
    if options.others:
        compare_others(mixture[: samples // 5], capacity, turns // 2, sizes)
        return
    if not options.gpu:
        compare_memory(arguments)  # first, while this process is small: a child's mark begins at its parent's
    with tempfile.TemporaryDirectory() as folder:
        check_equal_losses(mixture[:BATCH], sizes, Path(folder))
    compare_speed("Mixed lengths", ARMS, mixture, capacity, turns, sizes)
    if not options.gpu:
        compare_others(mixture[: samples // 5], capacity, turns // 2, sizes)
    random = np.random.default_rng(0)
    uniform = [make_document([0, sizes.image_tokens // 3], sizes, random) for _ in range(captions)]
    # Packs of as many samples as the batches have: nothing is gained by larger steps.
    compare_speed("Uniform captions, 8 a pack", ARMS[:2], uniform, BATCH * len(uniform[0]), turns, sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
