"""Checkpoints: Hugging Face folders and hub names in and out, GGUF files in.

config.json, *.safetensors ─┐                           ┌─▶ config.json, model.safetensors (transformers loads it)
*.gguf, dequantised ────────┴─ load_decoder ─▶ Decoder ─┴─ save_decoder

The families' layers are the same but for their options, so that one table of names serves them all. Weights are read
from safetensors and GGUF only: neither format can hold code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from mm.gguf import Gguf, open_gguf
from mm.layers.rope import Rope, inverse_frequencies
from mm.locate import PACKAGE, locate
from mm.model.decoder import Decoder, DecoderConfig

FAMILIES: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
"""Architectures that load, by the `model_type` of a config.json and the `general.architecture` of a GGUF file."""

HUGGING_FACE = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Our modules' names in a Hugging Face checkpoint."""

GGUF = {
    "embedding": "token_embd",
    "layers": "blk",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
"""Our modules' names in a GGUF file."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message says where, why and what to do."""


def load_decoder(location: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a checkpoint, on the CPU.

    Args:
        location: a folder with config.json and safetensors, a ``.gguf`` file, ``package://PACKAGE/FILE``, or a name on
            the Hugging Face hub, which is taken from the local cache where the hub cannot be reached.
        dtype: of all parameters. GGUF weights are dequantised in float32 first.

    Raises:
        CheckpointError: no such checkpoint, an architecture that is not in `FAMILIES`, weights that are not
            safetensors, or tensors that are missing or left over.
    """
    path = _find(location, with_weights=True)
    config = _read_config(path)
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = set(decoder.state_dict())
    found: dict[str, Tensor] = {}
    for name, tensor in _read_gguf(path, config) if path.is_file() else _read_safetensors(path):
        if name in wanted:
            found[name] = tensor.to(dtype)
        elif not _redundant(name, config):
            raise CheckpointError(f"{location}: the checkpoint holds {name}, which a decoder of its config has not")
    if missing := sorted(wanted - found.keys()):
        raise CheckpointError(f"{location}: {len(missing)} tensors are missing, the first of them {missing[0]}")
    for name, parameter in decoder.state_dict().items():
        if found[name].shape != parameter.shape:
            shapes = f"{tuple(found[name].shape)}, the config asks for {tuple(parameter.shape)}"
            raise CheckpointError(f"{location}: {name} has shape {shapes}")
    decoder.load_state_dict(found, assign=True)
    return decoder


def read_decoder_config(location: str | Path) -> DecoderConfig:
    """The sizes of a checkpoint, without its weights. Locations and errors are those of `load_decoder`."""
    return _read_config(_find(location, with_weights=False))


def save_decoder(decoder: Decoder, folder: str | Path, end: int | None = None) -> None:
    """Write config.json and model.safetensors (in several files above 5 GB), as transformers reads them.

    Args:
        decoder: with its weights whole in this process.
        folder: made if it does not exist.
        end: id of the token that ends a document, so that transformers' generation stops.

    Raises:
        CheckpointError: no family has this combination of options.
    """
    folder = Path(folder)
    dtype = str(decoder.head_weight.dtype).removeprefix("torch.")
    config = {**hf_config_from_decoder(decoder.config), "eos_token_id": end, "dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {_foreign(name, HUGGING_FACE): tensor.detach() for name, tensor in decoder.state_dict().items()}
    save_torch_state_dict(weights, folder)
    # Last, so that a folder whose writing was cut short is no checkpoint.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def decoder_config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Our sizes from the contents of a Hugging Face config.json.

    Raises:
        CheckpointError: an architecture or option that this decoder does not compute.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    # The file leaves out what equals the family's defaults, and older files spell RoPE otherwise: transformers knows.
    full = FAMILIES[family].from_dict(dict(config)).to_dict()
    if full["hidden_act"] != "silu":
        raise CheckpointError(f"hidden_act {full['hidden_act']!r} is not supported; this decoder has 'silu'")
    if sliding := set(full.get("layer_types") or []) - {"full_attention"}:
        raise CheckpointError(f"layers with {', '.join(sliding)} are not supported; this decoder has full attention")
    attention_bias = full.get("attention_bias", False)
    return DecoderConfig(
        vocabulary=full["vocab_size"],
        width=full["hidden_size"],
        layers=full["num_hidden_layers"],
        heads=full["num_attention_heads"],
        kv_heads=full["num_key_value_heads"],
        head_dim=full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"],
        ffn=full["intermediate_size"],
        context=full["max_position_embeddings"],
        rope=_rope_from_hf(full["rope_parameters"]),
        norm_eps=full["rms_norm_eps"],
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=full.get("mlp_bias", False),
        qk_norm="rms" if family == "qwen3" else "none",
        tied=full["tie_word_embeddings"],
    )


def hf_config_from_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Contents of the config.json with which transformers computes what this decoder computes.

    Raises:
        CheckpointError: no family has this combination of options.
    """
    if ours := [name for name in OURS if getattr(config, name) != getattr(DecoderConfig, name)]:
        raise CheckpointError(f"no architecture of transformers has this decoder's {', '.join(ours)}")
    options = (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm)
    family = next((name for name, allowed in _OPTIONS.items() if options in allowed), None)
    if family is None:
        named = "qkv_bias={}, output_bias={}, mlp_bias={}, qk_norm={}".format(*options)
        raise CheckpointError(f"no architecture of transformers has {named}; families are {', '.join(_OPTIONS)}")
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rope_parameters": _rope_to_hf(config.rope),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": None,
    }


OURS = ("norm", "experts", "untied", "depth")
"""Options that none of the families has. Dropout is for training only."""

_OPTIONS = {
    "llama": [(bias, bias, mlp, "none") for bias in (False, True) for mlp in (False, True)],
    "qwen2": [(True, False, False, "none")],
    "qwen3": [(bias, bias, False, "rms") for bias in (False, True)],
}
"""The (qkv_bias, output_bias, mlp_bias, qk_norm) that each family can have."""


def _rope_from_hf(parameters: Mapping[str, Any]) -> Rope:
    kind, base = parameters["rope_type"], float(parameters["rope_theta"])
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            base,
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"RoPE scaling {kind!r} is not supported; supported are default, linear and llama3")


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    parameters["rope_theta"] = rope.base
    if rope.scaling != "none":
        parameters["factor"] = rope.factor
    if rope.scaling == "llama3":
        parameters["low_freq_factor"] = rope.low_frequency_factor
        parameters["high_freq_factor"] = rope.high_frequency_factor
        parameters["original_max_position_embeddings"] = rope.original_context
    return parameters


def _find(location: str | Path, *, with_weights: bool) -> Path:
    """The ``.gguf`` file, or the folder with config.json (and weights) that a location names."""
    if str(location).startswith(PACKAGE) or Path(location).expanduser().exists():
        path = locate(location)
    else:
        path = _download(str(location), with_weights)
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(f"{location}: expected a .gguf file or the folder that holds config.json")
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(f"{location}: {path} holds no config.json; is it a Hugging Face checkpoint?")
    return path


def _download(name: str, with_weights: bool) -> Path:
    weights = ["*.safetensors", "*.safetensors.index.json"] if with_weights else []
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *weights]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{name!r} is no file or folder here, and as a name on the Hugging Face hub it could not be had: "
            f"{str(error).splitlines()[0]} Tried: the path {Path(name).absolute()}, the hub, and its local cache. "
            f"Check the spelling, or run `hf download {name}` on a machine with a network and pass the folder."
        ) from error


def _read_config(path: Path) -> DecoderConfig:
    try:
        if path.is_file():
            return _gguf_config(open_gguf(path))
        return decoder_config_from_hf(json.loads((path / "config.json").read_text()))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every tensor in a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / Path(name).name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not files:
        pickles = [file.name for file in folder.glob("*.bin")]
        raise CheckpointError(
            f"{folder}: no .safetensors weights"
            + (f", only {', '.join(pickles)}: pickle files can run code when read, so they are not" if pickles else "")
            + ". Convert once, where you trust them: `AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)`"
        )
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield _ours(name, HUGGING_FACE), tensors.get_tensor(name)


def _read_gguf(file: Path, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, float32 tensor) of every tensor in a GGUF file."""
    gguf = open_gguf(file)
    side_by_side = gguf.header["general.architecture"] == "llama"
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads} if side_by_side else {}
    for name, stored in gguf.tensors.items():
        module = name.split(".")[-2]
        tensor = stored.load()
        yield _ours(name, GGUF), _half_split(tensor, heads[module]) if module in heads else tensor


def _half_split(rows: Tensor, heads: int) -> Tensor:
    """(H·d, …) rows in the checkpoints' order again.

    RoPE turns pairs of values. llama.cpp stores Llama's queries and keys with the two of a pair side by side; Hugging
    Face (and `mm.layers.rope`) keep the first of all pairs in the first half of a head.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def _gguf_config(gguf: Gguf) -> DecoderConfig:
    family = gguf.header.get("general.architecture")
    if family not in FAMILIES:
        raise CheckpointError(f"architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    facts = {key.removeprefix(f"{family}."): value for key, value in gguf.header.items()}
    width, heads = facts["embedding_length"], facts["attention.head_count"]
    head_dim = facts.get("attention.key_length", width // heads)
    return DecoderConfig(
        vocabulary=gguf.tensors["token_embd.weight"].shape[0],
        width=width,
        layers=facts["block_count"],
        heads=heads,
        kv_heads=facts.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=facts["feed_forward_length"],
        context=facts["context_length"],
        rope=_gguf_rope(gguf, facts, head_dim),
        norm_eps=facts["attention.layer_norm_rms_epsilon"],
        qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
        output_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in gguf.tensors,
        qk_norm="rms" if "blk.0.attn_q_norm.weight" in gguf.tensors else "none",
        tied="output.weight" not in gguf.tensors,
    )


def _gguf_rope(gguf: Gguf, facts: Mapping[str, Any], head_dim: int) -> Rope:
    """GGUF keeps Llama 3's scaling as one divisor per frequency; all but `factor` is the same in all its models."""
    base, kind = facts.get("rope.freq_base", 10000.0), facts.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"RoPE scaling {kind!r} is not supported in GGUF files; load the safetensors checkpoint")
    if _ROPE_DIVISORS not in gguf.tensors:
        return Rope(base, kind, facts.get("rope.scaling.factor", 1.0))
    divisors = gguf.tensors[_ROPE_DIVISORS].load()
    rope = Rope(base, "llama3", factor=float(divisors.max()))
    if not torch.allclose(divisors, inverse_frequencies(Rope(base), head_dim) / inverse_frequencies(rope, head_dim)):
        raise CheckpointError("its RoPE divisors are not those of Llama 3; load the safetensors checkpoint")
    return rope


_ROPE_DIVISORS = "rope_freqs.weight"


def _redundant(name: str, config: DecoderConfig) -> bool:
    """Whether a stored tensor repeats what the config says: a tied head, or frequencies of RoPE."""
    return (name == "head.weight" and config.tied) or name == _ROPE_DIVISORS or name.endswith("rotary_emb.inv_freq")


def _foreign(name: str, table: Mapping[str, str]) -> str:
    """``layers.3.attention.query.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{table[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"{table['layers']}.{layer}.{table[inner]}.{kind}"


def _ours(name: str, table: Mapping[str, str]) -> str:
    """The inverse of `_foreign`; a name that is not in the table stays as it is."""
    ours = {foreign: own for own, foreign in table.items()}
    module, _, kind = name.rpartition(".")
    if not module.startswith(f"{table['layers']}."):
        return f"{ours[module]}.{kind}" if module in ours else name
    layer, _, inner = module.removeprefix(f"{table['layers']}.").partition(".")
    return f"layers.{layer}.{ours[inner]}.{kind}" if inner in ours else name
