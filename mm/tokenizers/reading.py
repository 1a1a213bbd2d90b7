"""Where a text tokenizer comes from: a folder, a hub name or a GGUF file; and where its chat template does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.configure import SIZE_LIMIT, RecipeError, find_preset
from mm.locate import PACKAGE, locate
from mm.pretrained import BringsCode, from_pretrained
from mm.tokenizers import gguf
from mm.tokenizers.templates import CHATML


def read_tokenizer(path: str) -> tuple[str, dict[str, str], str | None]:
    """Definition (the content of a ``tokenizer.json``), names of special roles, and chat template of a tokenizer.

    Raises:
        RecipeError: not there, not a fast tokenizer, or one that brings code.
    """
    try:
        found = locate(path) if path.startswith(PACKAGE) or Path(path).expanduser().exists() else None
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"tokenizer: {error}") from error
    if found is not None and found.is_file():
        try:
            tokenizer, roles, template = gguf.read_tokenizer(found)
        except ValueError as error:
            raise RecipeError(f"tokenizer: {error}") from error
        return tokenizer.to_str(), roles, template

    from transformers import AutoTokenizer  # seconds to import, and only needed here

    try:
        loaded: Any = from_pretrained(AutoTokenizer, found or path)
    except BringsCode as error:
        raise RecipeError(f"tokenizer: {error}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"tokenizer: {path!r} is no folder or GGUF file here, nor a name that the hub gives: {error}"
        ) from error
    if not loaded.is_fast:
        raise RecipeError(f"tokenizer: {path!r} has no tokenizer.json (a fast tokenizer); convert it with transformers")
    template = loaded.chat_template
    if isinstance(template, dict):  # several by name, for tools and the like
        template = template.get("default")
    roles = {name: str(token) for name, token in loaded.special_tokens_map.items() if not isinstance(token, list)}
    return loaded.backend_tokenizer.to_str(), roles, template


def named_template(name: str) -> str:
    """The chat template that a recipe names: ``chatml``, a file, or the text itself.

    Raises:
        RecipeError: there is no such file, or it is too large or no text.
    """
    if name == "chatml":
        return CHATML
    if "{{" in name or "{%" in name:
        return name
    file = find_preset(name)
    if file.stat().st_size > SIZE_LIMIT:
        raise RecipeError(
            f"tokenizer: {file} has {file.stat().st_size} bytes; a chat template has at most {SIZE_LIMIT}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"tokenizer: {file} is no chat template: not UTF-8 text: {error}") from error
