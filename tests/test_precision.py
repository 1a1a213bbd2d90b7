"""A float64 model computes in float64 throughout, and a float32 or bfloat16 one as it always has."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import mm
from mm.encoders.speech import SpeechTransform, WhisperEncoder, log_mel
from mm.layers.layout import Layout
from mm.layers.norm import RMSNorm
from mm.layers.rope import Rope, inverse_frequencies, rotation
from mm.media import Waveform
from mm.model.hub import load_decoder
from mm.model.multimodal import MultimodalLM
from mm.packing.collate import Processor
from mm.sample import Sample, Speech, Text
from mm.tokenizers.text import TextTokenizer
from mm.train.optim import clip_gradients
from tests.small_world import recording, tiny_model
from tests.test_guarantees import CASES, assert_same, collate, documents, step

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = str(Path(mm.__file__).parent)


# ---------------------------------------------------------------------------------------------- the whole in float64


NARROW = {torch.float32, torch.complex64, torch.bfloat16, torch.float16}


class Narrowed(TorchDispatchMode):
    """Notes where the package makes narrow tensors of others. The loss weights of a batch are narrow to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [one.dtype for one in tree_leaves(out) if isinstance(one, Tensor)]
        given = [one.dtype for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if NARROW & set(made) and not NARROW & set(given):
            *_, own = [None, *(frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT))]
            if own is not None and own.name not in ("uniform", "taken"):  # numbers that are drawn, and counts
                self.lines.add(f"{Path(own.filename).name}:{own.lineno} {own.line}")
        return out


@pytest.fixture(scope="module")
def processor(tokenizer: TextTokenizer) -> Processor:
    return Processor(tokenizer, tiny_model().entrances)


def experts(**options: Any) -> dict[str, Any]:
    groups = {"text": 2, "image": 2, "speech": 1, "point": 1}
    return {"experts": {"groups": groups, **options}, "depth": {"capacity": 0.5, "auxiliary": True}}


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return tiny_model().double().train()


@pytest.mark.parametrize(
    "sizes",
    [
        {"qk_norm": "layer"},
        {"qk_norm": "rms", "rope": {"scaling": "llama3"}, "dropout": 0.1},
        experts(auxiliary=True),
        experts(router="token_choice", groups={"all": 3}),
    ],
    ids=["layer norm", "rms norm", "experts choose", "tokens choose"],
)
def test_no_part_of_a_step_is_computed_in_less_than_float64(processor: Processor, sizes: dict[str, Any]) -> None:
    model = tiny_model(**sizes).double().train()
    batch = collate(processor, [documents(processor, CASES["everything"])])
    with Narrowed() as seen:
        step(model, [batch])
    assert seen.lines == set()
    assert seen.lines == set()


# ------------------------------------------------------------------------------------------------------------ decoder

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3 scaling": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear scaling": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, head_dim=16
    ),
    "qwen2": Qwen2Config(**SIZES, rms_norm_eps=1e-5),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


class ExactRotation(nn.Module):
    """cos and sin of transformers' rotary embedding, in float64 from its definition."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        parameters = config.rope_parameters
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies = parameters["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        if parameters["rope_type"] == "linear":
            frequencies = frequencies / parameters["factor"]
        if parameters["rope_type"] == "llama3":
            turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            kept = np.clip((turns - low) / (high - low), 0, 1)
            frequencies = kept * frequencies + (1 - kept) * frequencies / parameters["factor"]
        self.frequencies = torch.from_numpy(frequencies)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with those parts of it that transformers computes in float32 written out."""

    def normalise(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    inner: Any = model.double().model
    inner.rotary_emb = ExactRotation(model.config)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = normalise.__get__(module)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [0, 10**6])
@torch.no_grad()
def test_a_decoder_in_float64_gives_the_logits_of_transformers_to_its_last_digits(
    name: str, start: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind = MODELS[name].model_type.capitalize()
    reference = getattr(transformers, f"{kind}ForCausalLM")(MODELS[name])
    for key, parameter in reference.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in key else 0.0, std=0.2)
    reference.save_pretrained(tmp_path)
    decoder, reference = load_decoder(tmp_path).double(), exact(reference)
    tokens = torch.randint(0, 61, (70,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(start, start + 70)
    found = decoder(decoder.embed(tokens), positions, Layout.of([70])) @ decoder.head_weight.T
    expected = reference(tokens[None], position_ids=positions[None]).logits[0]
    # An angle of a million turns through as many radians, of which float64 keeps 1e-10.
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.std()) * (1e-12 if start == 0 else 1e-8))


@pytest.mark.parametrize("rope", [Rope(), Rope(5e5, "llama3", 8.0), Rope(1e4, "linear", 4.0)])
def test_angles_in_float64_are_exact_up_to_a_million_tokens(rope: Rope) -> None:
    positions = torch.tensor([0, 1, 77, 4096, 131_071, 999_983, 10**6])
    frequencies = inverse_frequencies(rope, 64, dtype=torch.float64).numpy().astype(np.longdouble)
    exponents = np.arange(0, 64, 2, dtype=np.longdouble) / 64
    if rope.scaling == "none":
        assert np.abs(frequencies / np.longdouble(rope.base) ** -exponents - 1).max() < 1e-15
    angles = positions.numpy().astype(np.longdouble)[:, None] * frequencies
    turned = rotation(rope, positions, 64, torch.float64)
    assert turned.cos.dtype == turned.sin.dtype == torch.float64
    assert np.abs(turned.cos[:, 0, :32].numpy() - np.cos(angles)).max() < 1e-9
    assert np.abs(turned.sin[:, 0, 32:].numpy() - np.sin(angles)).max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_narrower_models_are_to_the_bit_those_that_checkpoints_were_trained_with(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=LLAMA3, max_position_embeddings=10**6)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rope = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16)
    positions = torch.tensor([0, 1, 77, 4096, 131_071, 999_983])
    angles = positions[:, None, None].float() * inverse_frequencies(rope, 64)
    turned = rotation(rope, positions, 64, dtype)
    assert torch.equal(turned.cos, angles.cos().repeat(1, 1, 2).to(dtype))
    torch.testing.assert_close(inverse_frequencies(rope, 64), frequencies, rtol=1e-6, atol=0)


def test_a_norm_keeps_float64() -> None:
    norm, hidden = RMSNorm(8, 1e-6).double(), torch.randn(5, 8, dtype=torch.float64)
    expected = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(hidden), expected, rtol=1e-14, atol=0)


def test_clipping_scales_float64_gradients_in_float64() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    gradient = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter.grad = gradient.clone()
    assert float(clip_gradients([parameter], 1.0)) == pytest.approx(float(gradient.norm()), rel=1e-14)
    torch.testing.assert_close(parameter.grad, gradient / (gradient.norm() + 1e-6), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------- speech


def noise(samples: int, seed: int) -> Waveform:
    values = np.random.default_rng(seed).integers(-9000, 9000, samples)
    return Waveform((values / 32768).astype(np.float32), 16_000)


LENGTHS = [[4000, 16_000, 321], [160, 48_000], [30 * 16_000 + 500, 900], [7_777, 7_778, 7_779, 1], [1, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["masked", "padded to 30 s"])
def test_recordings_of_unequal_lengths_give_the_features_and_gradients_of_each_alone(
    lengths: list[int], padded: bool
) -> None:
    if padded and len(lengths) > 2:
        lengths = lengths[:2]  # 30 s each
    torch.manual_seed(0)
    encoder = WhisperEncoder(width=16, depth=1, heads=2, mels=80, pad_to_30s=padded).double()
    transform: SpeechTransform = encoder.transform
    prepared = [transform.prepare(noise(length, seed)) for seed, length in enumerate(lengths)]

    def features_and_gradients(groups: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        encoder.zero_grad()
        features = torch.cat([encoder(**transform.collate(group)) for group in groups])
        pattern = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view_as(features)
        (features * pattern).sum().backward()
        return features.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    packed, gradients = features_and_gradients([prepared])
    alone, expected = features_and_gradients([[one] for one in prepared])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11 * float(alone.abs().max()))
    for found, other in zip(gradients, expected, strict=True):
        assert float((found - other).abs().max()) <= 1e-10 * max(float(other.abs().max()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectrogram_depends_on_its_own_recording_only(dtype: torch.dtype) -> None:
    windows = SpeechTransform().collate([SpeechTransform().prepare(noise(size, size)) for size in (900, 70_000)])
    found = log_mel(windows["windows"], 80, dtype)
    assert found.dtype == dtype
    for together, window in zip(found, windows["windows"], strict=True):
        alone = log_mel(window[None], 80, dtype)[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_pack_of_unequal_recordings_gives_the_gradients_of_each_alone(
    processor: Processor, model: MultimodalLM, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    samples = [
        Sample("test", str(number), (Speech(recording(number, int(frames))), Text("two words")))
        for number, frames in enumerate(draw.integers(1, 20_000, 5))
    ]
    made = documents(processor, samples, seed)
    packed = step(model, [collate(processor, [made])])
    assert_same(packed, step(model, [collate(processor, [[one]]) for one in made]), 1e-10)
