"""The tokenizer inside a GGUF file, read from the file's header alone in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mm.gguf import open_gguf

_CONTROL, _USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``: special tokens, and added ones that are not special."""

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """The word pattern that Llama 3 and Qwen 2 share but for the digits of a piece."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""How text is cut before byte-level BPE, by ``tokenizer.ggml.pre``."""


class GgufTokenizer(NamedTuple):
    """A tokenizer with the names of its special roles (``eos_token`` …) and its chat template."""

    tokenizer: Tokenizer
    roles: dict[str, str]
    template: str | None


def read_tokenizer(file: Path) -> GgufTokenizer:
    """The byte-level BPE tokenizer of a GGUF file.

    Raises:
        ValueError: not a GGUF file, or a kind of tokenizer that is not read here.
    """
    header = open_gguf(file).header
    kind, cut = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file}: tokenizer {kind!r} with pre-tokenizer {cut!r}; read are 'gpt2' with {', '.join(PRE_TOKENIZERS)}. "
            f"Name a folder with the model's tokenizer.json instead."
        )
    names: list[str] = header["tokenizer.ggml.tokens"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [(first, second) for first, _, second in (m.partition(" ") for m in header["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]
    tokenizer.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    types = header.get("tokenizer.ggml.token_type", [])
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [name for name, of_kind in zip(names, types, strict=False) if of_kind == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(name, special=special, normalized=False) for name in added])

    roles = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = header.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            roles[f"{role}_token"] = names[number]
    if header.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe") and "bos_token" in roles:
        start = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
        )
    return GgufTokenizer(tokenizer, roles, header.get("tokenizer.chat_template"))
