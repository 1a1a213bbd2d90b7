"""The guarantees of the joined whole, on one process: what shares a pack never shows in losses, gradients or logits."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.model.multimodal import MultimodalLM
from mm.objectives.next_token import NextToken
from mm.packing.batch import Batch
from mm.packing.collate import Document, Processor
from mm.sample import Image, PointCloud, Sample, Speech, Text
from mm.tokenizers.text import TextTokenizer
from tests.small_world import cloud, picture, recording, tiny_model, words

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = ["test"]


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return tiny_model().train()


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer, model: MultimodalLM) -> Processor:
    return Processor(tokenizer, model.entrances)


def sample(*parts: str | bytes | Text | Image | Speech | PointCloud) -> Sample:
    return Sample("test", "a sample", tuple(Text(part) if isinstance(part, str) else part for part in parts))  # type: ignore[misc]


def image(seed: int) -> Image:
    return Image(picture(seed))


CASES: dict[str, list[Sample]] = {
    "text": [sample(words(seed)) for seed in range(4)],
    "one document": [sample(image(1), words(1))],
    "images first": [sample(image(seed), words(seed)) for seed in range(3)],
    "images last": [sample(words(1), image(1)), sample(words(2), image(2)), sample("x")],
    "images adjacent": [sample(image(1), image(2), "two", image(3), image(4)), sample(words(3)), sample(image(5), "a")],
    "image between words": [sample(words(1), image(1), words(2)), sample(words(3), image(2), image(3), words(4))],
    "speech": [sample(Speech(recording(seed, 1500 + 700 * seed)), words(seed)) for seed in range(3)],
    "points": [sample(PointCloud(cloud(seed, 10 + 20 * seed)), words(seed)) for seed in range(3)],
    "chats": [
        sample(Text("What?", False, "user"), replace(image(seed), role="user"), Text(words(seed), True, "assistant"))
        for seed in range(3)
    ],
    "no loss on some words": [sample(Text(words(1), loss=False), words(2)), sample(words(3), Text("no", loss=False))],
    "everything": [
        sample(image(1), words(1)),
        sample(words(2)),
        sample(Speech(recording(3)), words(3)),
        sample(words(4), PointCloud(cloud(4)), image(5), Speech(recording(6, 2500)), words(7)),
        sample(image(8), image(9)),
        sample(words(10)),
    ],
}


def documents(processor: Processor, samples: Sequence[Sample], seed: int = 0) -> list[Document]:
    """The samples as documents, every token with a loss weight of its own."""
    draw = np.random.default_rng(seed)
    made = [processor.document(one) for one in samples]
    return [replace(one, weights=one.weights * draw.uniform(0.2, 2.0, len(one)).astype(np.float32)) for one in made]


def collate(processor: Processor, packs: Sequence[Sequence[Document]], capacity: int | None = None) -> Batch:
    rows = [[(0, 0, number) for number, _ in enumerate(pack)] for pack in packs]
    return processor.collate(packs, rows, capacity=capacity)


def step(model: MultimodalLM, batches: Sequence[Batch], z_loss: float = 1e-3) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step over micro-batches."""
    objective = NextToken(z_loss)
    denominators = objective.weights(batches)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss, _ = objective.loss(model, batch, denominators, SOURCES)
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, gradients


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], relative: float) -> None:
    """Equal losses, and gradients that differ by less than `relative` of the largest of their parameter.

    A gradient that is zero up to rounding (the keys' biases, of which the softmax knows nothing) is measured by the
    largest of the model.
    """
    assert one[0] == pytest.approx(other[0], rel=relative, abs=1e-30)
    assert one[1].keys() == other[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in other[1].values())
    for name, gradient in one[1].items():
        expected = other[1][name]
        scale = max(float(expected.abs().max()), 1e-4 * largest)
        assert float((gradient - expected).abs().max()) <= relative * scale, name


# ------------------------------------------------------------------------------------- 1. packed equals unpacked


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_a_pack_gives_the_loss_and_gradients_of_its_documents_alone(
    processor: Processor, model: MultimodalLM, case: str, dtype: torch.dtype, relative: float
) -> None:
    model = model.to(dtype)
    made = documents(processor, CASES[case])
    packed = step(model, [collate(processor, [made])])
    alone = step(model, [collate(processor, [[one]]) for one in made])
    assert_same(packed, alone, relative)


@pytest.mark.parametrize("shares", [[1, 5], [3, 3], [2, 2, 2], [6]])
def test_micro_batches_packs_and_padding_do_not_change_the_step(
    processor: Processor, model: MultimodalLM, shares: list[int]
) -> None:
    model = model.double()
    made = documents(processor, CASES["everything"])
    longest = sum(map(len, made))
    batches, start = [], 0
    for share in shares:
        packs = [made[start : start + share // 2], made[start + share // 2 : start + share]]
        batches.append(collate(processor, packs, capacity=longest))
        start += share
    assert_same(step(model, batches), step(model, [collate(processor, [made])]), 1e-10)


def test_the_order_of_documents_does_not_change_the_step(processor: Processor, model: MultimodalLM) -> None:
    model = model.double()
    made = documents(processor, CASES["everything"])
    assert_same(step(model, [collate(processor, [made[::-1]])]), step(model, [collate(processor, [made])]), 1e-10)


def test_the_loss_is_the_weighted_mean_over_all_labels(processor: Processor, model: MultimodalLM) -> None:
    model = model.double()
    made = documents(processor, CASES["everything"])
    weighted = weights = 0.0
    for one in made:
        batch = collate(processor, [[one]])
        logits = model.hidden(batch) @ model.decoder.head_weight.T
        nll = torch.nn.functional.cross_entropy(logits[:-1], batch.tokens[1:], reduction="none")
        targets = torch.from_numpy(one.weights[1:]).double()
        weighted, weights = weighted + float((nll @ targets).detach()), weights + float(targets.sum())
    loss, _ = step(model, [collate(processor, [made])], z_loss=0.0)
    assert loss == pytest.approx(weighted / weights, rel=1e-10)


# ------------------------------------------------------------------------------- 2. documents never see each other

REPLACEMENTS = {
    "text": (sample(words(20)), sample(words(20)[::-1])),
    "image": (sample("ab", image(20), "cd"), sample("xy", image(21), "zw")),
    "speech": (sample(Speech(recording(20)), "ab"), sample(Speech(recording(21)), "xy")),
    "points": (sample(PointCloud(cloud(20)), "ab"), sample(PointCloud(cloud(21)), "xy")),
}


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("kind", REPLACEMENTS)
@torch.no_grad()
def test_replacing_a_document_changes_no_bit_of_the_others(
    processor: Processor, model: MultimodalLM, kind: str, place: int
) -> None:
    model = model.float()
    logits = []
    for replacement in REPLACEMENTS[kind]:
        samples = [*CASES["everything"][:place], replacement, *CASES["everything"][place:]]
        batch = collate(processor, [[processor.document(one) for one in samples]])
        logits.append((model.hidden(batch) @ model.decoder.head_weight.T).split(batch.offsets.diff().tolist()))
    for number, (before, after) in enumerate(zip(*logits, strict=True)):
        assert torch.equal(before, after) == (number != place)


# -------------------------------------------------------------------------------------- 5. modalities that are missing


@pytest.mark.parametrize(
    ("case", "present"), [("text", []), ("images adjacent", ["image"]), ("speech", ["speech"]), ("points", ["point"])]
)
def test_an_encoder_without_items_changes_no_other_gradient(
    processor: Processor, model: MultimodalLM, case: str, present: list[str]
) -> None:
    model = model.float()
    batch = collate(processor, [documents(processor, CASES[case])])
    loss, gradients = step(model, [batch])

    without = tiny_model(present).train()
    without.load_state_dict({name: model.state_dict()[name] for name in without.state_dict()})
    expected_loss, expected = step(without, [batch])
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    absent = gradients.keys() - expected.keys()
    assert {name.split(".")[1] for name in absent} == {"image", "speech", "point"} - set(present)
    assert all(not gradients[name].any() for name in absent)


def test_an_empty_pack_takes_part_without_changing_anything(processor: Processor, model: MultimodalLM) -> None:
    model = model.double()
    made = documents(processor, CASES["everything"])
    full = collate(processor, [made])
    loss, gradients = step(model, [full, collate(processor, [[]])])
    assert_same((loss, gradients), step(model, [full]), 1e-12)
    _, of_nothing = step(model, [collate(processor, [[]])])
    assert of_nothing.keys() == gradients.keys()
    assert all(not gradient.any() for gradient in of_nothing.values())


# ------------------------------------------------------------------------------------------ 7. nothing untrusted runs

FORBIDDEN_IMPORTS = {"cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"from_pretrained", "from_config"}
UNSAFE_LOADS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def dangers(source: str) -> list[str]:
    """What in a module could run code that a file brings along.

    Not a danger is a subclass of `pickle.Unpickler` that decides itself what may be found.
    """
    found = []
    tree = ast.parse(source)
    careful = {
        id(base)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body)
        for base in node.bases
    }
    for node in ast.walk(tree):
        if id(node) in careful:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS]
            found += [alias.asname for alias in node.names if alias.name == "pickle" and alias.asname]
        elif isinstance(node, ast.Attribute) and dotted(node) in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            found.append(dotted(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS | {"pickle"}:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
            if name in FORBIDDEN_CALLS | UNSAFE_LOADS or options.get("shell") or options.get("allow_pickle"):
                found.append(name)
            if name == "torch.load" and options.get("weights_only") is not True:
                found.append(name)
            owner, _, method = name.rpartition(".")
            if owner and method in LOADERS and options.get("trust_remote_code") is not False:
                found.append(name)
            if method == "import_module" and not isinstance(node.args[0], ast.Constant):
                found.append(name)
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") is not False:
                found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as harmless",
        "pickle.load(file)",
        "class Careless(pickle.Unpickler):\n    pass",
        "from pickle import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_config(config)",
        "importlib.import_module(name)",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert dangers(source)


def test_nothing_in_the_package_runs_what_a_file_brings_along() -> None:
    files = sorted(Path("mm").rglob("*.py"))
    assert len(files) > 40
    found = {str(file): dangers(file.read_text(encoding="utf-8")) for file in files}
    # What a recipe names is imported in one place, which asks what the user allows.
    assert {file: names for file, names in found.items() if names} == {"mm/allow.py": ["import_module"]}
