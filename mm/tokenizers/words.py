"""Control words, such as ``<|im_end|>`` or ``<think>``, and tokenizers that never make them of the words of a sample.

A tokenizer finds its added tokens in a text before it cuts anything else. Those that steer a model are *control words*,
whether the tokenizer calls them special or not: the words of a sample are spelled out instead, letter by letter if need
be. An added token that is white space or one visible character steers nothing; it is text.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from mm.configure import RecipeError


class Found(NamedTuple):
    """A control word in a text, with the white space that it swallows."""

    start: int
    end: int
    id: int
    special: bool


class WordTokenizers(NamedTuple):
    """Tokenizers that take control words for plain text: one for the start of a document, one for within it.

    They differ for SentencePiece models only, which put a space before the first word of a document and nowhere else.

    unknown: id of what the vocabulary cannot spell, if there is one
    """

    opening: Tokenizer
    inner: Tokenizer
    unknown: int | None


class ControlWords:
    """The control words of a tokenizer. ids: of each, by its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = sorted(tokenizer.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content))
        tokens = [(number, token) for number, token in added if is_control(token.content, token.special)]
        self.ids = {token.content: number for number, token in tokens}
        self._special = {token.content: token.special for _, token in tokens}
        self._pattern = re.compile("|".join(_form(token) for _, token in tokens) or r"(?!)")

    def find(self, text: str) -> Iterator[Found]:
        """The control words of a trusted text, in order."""
        for match in self._pattern.finditer(text):
            name = match[match.lastindex or 0]
            yield Found(match.start(), match.end(), self.ids[name], self._special[name])

    def check_known(self, names: Collection[str]) -> None:
        """Raises `RecipeError` for a name in a recipe's `control_words` that the tokenizer has not."""
        for name in names:
            if name not in self.ids:
                near = difflib.get_close_matches(name, self.ids, n=3)
                hint = (
                    f"did you mean {' or '.join(map(repr, near))}?" if near else f"some are {' '.join([*self.ids][:8])}"
                )
                raise RecipeError(f"tokenizer: `control_words` has {name!r}, which is no added token of it; {hint}")


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers a model, so that words must not become it."""
    is_space = re.fullmatch(r"[ \t\r\n▁]+", content) is not None
    return special or not (is_space or (len(content) == 1 and content.isprintable()))


def _form(token: AddedToken) -> str:
    """Some tokens swallow the white space beside them (Phi-3 writes "<|end|>\\n" and means one token)."""
    space = {False: "", True: r"\s*"}
    before, after = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    return f"{space[token.lstrip]}{before}({re.escape(token.content)}){after}{space[token.rstrip]}"


def tokenizers_of_words(definition: str, allowed: Collection[str]) -> WordTokenizers:
    """The tokenizers of a definition for the words of samples.

    Args:
        definition: the content of a ``tokenizer.json``.
        allowed: control words that text may spell all the same.
    """
    content = json.loads(definition)
    # Truncation and padding would change lengths; the post-processor adds tokens and trims spaces off the offsets.
    content |= {"truncation": None, "padding": None, "post_processor": None}
    _spell_out(content, allowed)
    opening, model = _tokenizer(content), content["model"]
    unknown = model["unk_id"] if "unk_id" in model else model["vocab"].get(model.get("unk_token"))
    if '"prepend_scheme": "first"' not in json.dumps(content["pre_tokenizer"]):
        return WordTokenizers(opening, opening, unknown)
    inner = json.dumps(content["pre_tokenizer"]).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return WordTokenizers(opening, _tokenizer(content | {"pre_tokenizer": json.loads(inner)}), unknown)


def _tokenizer(content: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # special ones are not looked for in a text
    return tokenizer


def _spell_out(content: dict[str, Any], allowed: Collection[str]) -> None:
    """Make control words special, all others not, and take those that the model itself could compose out of its reach.

    Tokens keep their places in the list: the library numbers them by it.
    """
    model, added = content["model"], content["added_tokens"]
    hidden = {token["content"] for token in added if is_control(token["content"], token["special"])} - {*allowed}
    composed = _composed(model, hidden)
    _take_out(model, composed)
    content["added_tokens"] = [
        token | {"special": token["content"] in hidden} for token in added if token["content"] not in composed
    ]


def _composed(model: dict[str, Any], names: set[str]) -> set[str]:
    """Names that are pieces of the model as well, which plain text may be cut into."""
    vocabulary = model["vocab"]
    pieces = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys()
    inside = {name for name in names if name in pieces} - {model.get("unk_token")}
    if model.get("byte_fallback"):
        inside = {name for name in inside if not re.fullmatch(r"<0x[0-9A-F]{2}>", name)}
    if "merges" not in model or model.get("ignore_merges") or not inside:
        return inside
    return {name for name in inside if len(name) == 1} | {_merged(model, pair) for pair in model["merges"]} & inside


def _take_out(model: dict[str, Any], names: set[str]) -> None:
    """Rename pieces, so that no text spells them and all others keep their ids."""
    if not names:
        return
    renamed = {name: secrets.token_hex(16) for name in names}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {renamed.get(piece, piece): number for piece, number in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if not names & {*_pair(pair)} and _merged(model, pair) not in names
        ]


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _merged(model: dict[str, Any], merge: Any) -> str:
    first, second = _pair(merge)
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")
