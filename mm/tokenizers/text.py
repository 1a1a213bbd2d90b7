"""Text to token ids: samples become documents of pieces, chats through the model's own template.

    Sample ──lay out──▶ spans of text │ media ──join, cut at special tokens──▶ runs ──encode──▶ pieces
                        (loss? trusted?)

A *span* is text from one origin: the words of a sample are untrusted, what a chat template or the recipe puts around
them is trusted. Special tokens are recognised in trusted text only, so that a caption that contains ``<|im_end|>``
cannot end a turn. Neighbouring spans are encoded together, as one text, and the loss is laid over the tokens by their
offsets: ids are those that the model's own tokenizer gives for the whole text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mm.configure import RecipeError, find_preset
from mm.locate import PACKAGE, locate
from mm.pretrained import BringsCode, from_pretrained
from mm.sample import BrokenSample, Codes, MediaPart, Modality, Part, Sample, Text
from mm.tokenizers.gguf import read_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template that ``template: chatml`` names, for base models that come without one."""

RULES = 1
"""Version of the rules in this file, part of the fingerprint: raise it when a change gives a sample other ids."""


class ChatError(ValueError):
    """A chat that the template cannot render exactly; the message says which and why."""


class RefusedChat(ChatError, BrokenSample):
    """A chat that the template itself refuses, for the order of its roles; other chats are fine."""


class _Refusal(TemplateError):
    """What a template raises by ``raise_exception``."""


class Piece(NamedTuple):
    """A stretch of a document: text ids that bear loss or not, or the place of a media part or its codes (without ids).

    Of media parts, only codes can bear loss.
    """

    ids: tuple[int, ...]
    loss: bool
    part: MediaPart | Codes | None = None


@dataclass(frozen=True)
class Around:
    """Text before and after every item of a modality, never with loss. May hold special tokens."""

    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class TokenizerOptions:
    """`tokenizer:` of a recipe.

    path: folder, hub name, `.gguf` file, or ``package://PACKAGE/FILE``
    template: None takes the chat template that comes with the tokenizer; ``chatml``, a `.jinja` file, or the text of a
        template
    end: token that ends a document; None takes the tokenizer's end-of-sequence token
    begin: token that opens a document other than a chat; None takes what the tokenizer itself opens a text with. A
        language model that never saw a document begin with a picture makes its first embedding a sink of attention:
        gradients of an adapter are hundreds of times larger and useless unless a token it knows stands before
    around: text around media, by modality
    words_only: leave media out of documents, see `WordsOnly`
    """

    path: str
    template: str | None = None
    end: str | None = None
    begin: str | None = None
    around: dict[str, Around] = field(default_factory=dict)
    words_only: bool = False

    def __post_init__(self) -> None:
        allowed = [modality.label for modality in Modality if modality is not Modality.TEXT]
        for name in self.around:
            if name not in allowed:
                raise RecipeError(f"`around` names {name!r}; expected {', '.join(allowed)}")


class _Span(NamedTuple):
    """Text of one origin. Special tokens are recognised in trusted text only."""

    text: str
    loss: bool
    trusted: bool


_Laid = _Span | Piece


class TextTokenizer:
    """A Hugging Face fast tokenizer that renders samples.

    vocabulary: number of ids, the size of an embedding table that holds them all
    end: id that ends a document; pad: id in slots and padding; begin: ids that open a document other than a chat
    fingerprint: changes with anything that could change the ids of a sample
    """

    def __init__(
        self,
        definition: str,
        roles: dict[str, str],
        template: str | None = None,
        end: str | None = None,
        begin: str | None = None,
        around: dict[str, Around] | None = None,
    ) -> None:
        """
        Args:
            definition: the content of a ``tokenizer.json``.
            roles: names of special tokens, ``{"eos_token": "<|im_end|>", …}``, as chat templates use them.
        """
        self._arguments = (definition, roles, template, end, begin, around)
        whole = Tokenizer.from_str(definition)
        self._opening, self._inner = _text_only(definition)
        self._special = _SpecialTokens(whole)
        self._template = template
        self._around = around or {}
        self._roles = roles
        self._skeletons: dict[tuple[tuple[str, ...], bool], list[str]] = {}

        self.vocabulary = max(whole.get_vocab(with_added_tokens=True).values()) + 1
        name = end or roles.get("eos_token", "")
        number = whole.token_to_id(name)
        if number is None:
            raise RecipeError(
                f"tokenizer: the end token is {name!r}, which it does not hold; set `end` to one it holds"
            )
        self.end: int = number
        pad = whole.token_to_id(roles.get("pad_token", ""))
        self.pad: int = self.end if pad is None else pad
        opened, plain = whole.encode("a").ids, whole.encode("a", add_special_tokens=False).ids
        self.begin: tuple[int, ...] = tuple(opened[: opened.index(plain[0])])
        if begin is not None:
            first = whole.token_to_id(begin)
            if first is None:
                raise RecipeError(f"tokenizer: `begin` is {begin!r}, which it does not hold")
            self.begin = (first,)
        self._begin = Piece(self.begin, loss=False)
        self.fingerprint = _fingerprint(
            RULES, definition, roles, template, name, self.begin, repr(sorted(self._around.items()))
        )
        self._check_that_words_stay_words()

    @classmethod
    def load(cls, options: TokenizerOptions | str) -> TextTokenizer:
        """The tokenizer of a folder, a hub name or a GGUF file.

        Raises:
            RecipeError: not there, not a fast tokenizer, or no end token.
        """
        if isinstance(options, str):
            options = TokenizerOptions(options)
        definition, roles, template = _read(options.path)
        if options.template is not None:
            template = _named_template(options.template)
        kind = WordsOnly if options.words_only else cls
        return kind(definition, roles, template, options.end, options.begin, options.around)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    # ------------------------------------------------------------------------------------------------- plain text

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text: never a special token, whatever it contains."""
        return self._opening.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._opening.decode(list(ids), skip_special_tokens=False)

    # -------------------------------------------------------------------------------------------------- documents

    def render(self, sample: Sample) -> list[Piece]:
        """The document of a sample.

        A caption or page is its parts in order, words verbatim, then `end`, which bears loss if the last words or codes
        do; codes always do. A chat is what its template gives; loss is on the words of the assistant that ask for it,
        on the assistant's codes, and on the special token that ends such a turn. A message is stripped of white space
        at both ends, as most templates do themselves; neighbouring parts of one role are one message.

        Raises:
            ChatError: there is no template, or it does not give every message back once and in order.
            RefusedChat: it refuses this chat.
        """
        try:
            return self._pieces(self._lay_out(sample))
        except ChatError as error:
            raise type(error)(f"{sample.source}, {sample.key}: {error}") from error

    def render_prompt(self, parts: Sequence[Part]) -> list[Piece]:
        """The document up to where the model is to go on, without loss.

        What is asked for is left out, if it is there: the trailing parts of the assistant in a chat, the trailing words
        with loss elsewhere. A chat then opens the assistant's turn.
        """
        given = list(parts)
        if any(part.role is not None for part in parts):
            while given and given[-1].role == "assistant":
                given.pop()
            laid = self._chat(given, prompt=True)
        else:
            while given and isinstance(given[-1], Text) and given[-1].loss:
                given.pop()
            laid = self._page(given)
        return self._pieces(item._replace(loss=False) if item.loss else item for item in laid)

    @property
    def stop(self) -> frozenset[int]:
        """Ids at which an answer is over: `end`, and what ends the assistant's turn where there is a template.

        They differ for a base model with a chosen template: ``<|endoftext|>`` and ``<|im_end|>``.
        """
        if self._template is None:
            return frozenset({self.end})
        closing = self._skeleton(("user", "assistant"), prompt=False)[-1]
        *_, token, _ = self._special.cut(_Span(closing[: self._end_of_turn(closing)], True, trusted=True))
        return frozenset({self.end, *(token.ids if isinstance(token, Piece) else ())})

    def lengths(self, samples: Iterable[Sample]) -> np.ndarray:
        """(n,) int64 number of text tokens of every document, media not counted, in one batched call."""
        fixed: list[int] = []
        texts: dict[bool, list[str]] = {True: [], False: []}
        owners: dict[bool, list[int]] = {True: [], False: []}
        for number, sample in enumerate(samples):
            fixed.append(0)
            for opening, run in self._runs(self._lay_out(sample)):
                if isinstance(run, Piece):
                    fixed[-1] += len(run.ids)
                else:
                    texts[opening].append("".join(span.text for span in run))
                    owners[opening].append(number)
        lengths = np.array(fixed, np.int64)
        for opening, tokenizer in ((True, self._opening), (False, self._inner)):
            encodings = tokenizer.encode_batch_fast(texts[opening], add_special_tokens=False)
            np.add.at(lengths, owners[opening], [len(encoding) for encoding in encodings])
        return lengths

    # ----------------------------------------------------------------------------------------- laying out a sample

    def _lay_out(self, sample: Sample) -> list[_Laid]:
        if sample.is_chat:
            return self._chat(sample.parts, prompt=False)
        return [*self._page(sample.parts), Piece((self.end,), _ends_with_loss(sample.parts))]

    def _page(self, parts: Sequence[Part]) -> list[_Laid]:
        """Parts one after the other."""
        laid: list[_Laid] = [self._begin] if self.begin else []
        for part in parts:
            laid += self._laid(part, _bears_loss(part))
        return laid

    def _laid(self, part: Part, loss: bool) -> list[_Laid]:
        if isinstance(part, Text):
            return [_Span(part.text, loss, trusted=False)]
        around = self._around.get(part.modality.label, Around())
        return [_Span(around.before, False, True), Piece((), loss, part), _Span(around.after, False, True)]

    def _chat(self, parts: Sequence[Part], prompt: bool) -> list[_Laid]:
        """The template's text around the words of every message."""
        for number, part in enumerate(parts):
            if part.role is None:
                raise ChatError(f"part {number} of a chat has no role")
        messages = [(role, _stripped(list(group))) for role, group in itertools.groupby(parts, lambda part: part.role)]
        opening, *closings = self._skeleton(tuple(str(role) for role, _ in messages), prompt)
        laid: list[_Laid] = [_Span(opening, False, trusted=True)]
        for (role, contents), closing in zip(messages, closings, strict=True):
            speaks = role == "assistant"
            for part in contents:
                laid += self._laid(part, speaks and _bears_loss(part))
            cut = self._end_of_turn(closing) if speaks and _ends_with_loss(contents) else 0
            laid += [_Span(closing[:cut], True, trusted=True), _Span(closing[cut:], False, trusted=True)]
        return laid

    def _end_of_turn(self, closing: str) -> int:
        """Where the special token ends that closes a turn of the assistant."""
        match = self._special.pattern.search(closing)
        if match is None or closing[: match.start()].strip():
            raise ChatError(
                f"the chat template writes {closing[:40]!r} after the assistant's words, which starts with no special "
                f"token of the tokenizer: the model would never learn to end its turn"
            )
        return match.end()

    def _skeleton(self, roles: tuple[str, ...], prompt: bool) -> list[str]:
        """What the template writes before, between and after n messages: n + 1 texts. Depends on the roles alone."""
        key = (roles, prompt)
        if key not in self._skeletons:
            self._skeletons[key] = self._rendered_around_marks(roles, prompt)
        return self._skeletons[key]

    def _rendered_around_marks(self, roles: tuple[str, ...], prompt: bool) -> list[str]:
        """Renders marks in the place of the words: where they come out, the words go in.

        The words of a sample never meet the template, so they can neither steer it nor be taken for a mark.
        """
        if self._template is None:
            raise ChatError(
                "the tokenizer has no chat template; set one in the recipe (`template: chatml` is the plain default)"
            )
        messages = [{"role": role, "content": f"mmContent{number}End"} for number, role in enumerate(roles)]
        try:
            text = _compiled(self._template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._roles
            )
        except _Refusal as error:
            raise RefusedChat(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error
        except (TemplateError, TypeError) as error:  # TypeError: a template that expects contents of another shape
            raise ChatError(f"the chat template fails on the roles {', '.join(roles)}: {error}") from error
        texts = re.split(r"mmContent(\d+)End", text)
        found = [int(number) for number in texts[1::2]]
        if found != list(range(len(roles))):
            fate = "drops" if len(found) < len(roles) else "repeats" if len(found) > len(roles) else "reorders"
            raise ChatError(f"the chat template {fate} messages: of the roles {', '.join(roles)} it gives {found}")
        return texts[0::2]

    # ------------------------------------------------------------------------------------------------- encoding

    def _pieces(self, laid: Iterable[_Laid]) -> list[Piece]:
        """Encoded pieces; neighbours with the same loss are one."""
        pieces: list[Piece] = []
        for opening, run in self._runs(laid):
            for piece in [run] if isinstance(run, Piece) else self._encoded(run, opening):
                last = pieces[-1] if pieces else None
                if last is not None and last.part is None and piece.part is None and last.loss == piece.loss:
                    pieces[-1] = Piece(last.ids + piece.ids, piece.loss)
                else:
                    pieces.append(piece)
        return pieces

    def _runs(self, laid: Iterable[_Laid]) -> Iterator[tuple[bool, Piece | list[_Span]]]:
        """Spans that are encoded together, and the special tokens and media between them; with whether a run opens."""
        run: list[_Span] = []
        opening = True
        for item in laid:
            for cut in [item] if isinstance(item, Piece) or not item.trusted else self._special.cut(item):
                if isinstance(cut, _Span):
                    if cut.text:
                        run.append(cut)
                    continue
                if run:
                    yield opening, run
                    run = []
                yield opening, cut
                opening = opening and cut is self._begin
        if run:
            yield opening, run

    def _encoded(self, run: list[_Span], opening: bool) -> list[Piece]:
        """A token bears loss if it covers any character that does."""
        encoding = (self._opening if opening else self._inner).encode(
            "".join(span.text for span in run), add_special_tokens=False
        )
        if len({span.loss for span in run}) == 1:
            return [Piece(tuple(encoding.ids), run[0].loss)]
        bears = np.repeat([span.loss for span in run], [len(span.text) for span in run])
        losses = [bool(bears[start : max(end, start + 1)].any()) for start, end in encoding.offsets]
        tokens = zip(encoding.ids, losses, strict=True)
        grouped = itertools.groupby(tokens, lambda token: token[1])
        return [Piece(tuple(number for number, _ in group), loss) for loss, group in grouped]

    def _check_that_words_stay_words(self) -> None:
        """Some models hold special tokens as ordinary pieces too: then words could not be told from commands."""
        for name, number in self._special.ids.items():
            if number in self.encode(name):
                raise RecipeError(
                    f"tokenizer: plain text {name!r} becomes the special token itself; untrusted text could"
                )


class WordsOnly(TextTokenizer):
    """Leaves the media of samples out: the words have the ids that they have beside media, and what stands around media
    stays. For a language model of captions, such as the reference of PRIOR.

    A document whose first token bears loss is opened with `end`, so that the token has a probability.

    beside_media: fingerprint of the tokenizer that keeps media
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.beside_media = self.fingerprint
        self.fingerprint = _fingerprint(self.fingerprint, type(self).__name__)

    def render(self, sample: Sample) -> list[Piece]:
        pieces = [piece for piece in super().render(sample) if piece.part is None]
        return [Piece((self.end,), False), *pieces] if pieces[0].loss else pieces


class MediaOnly(TextTokenizer):
    """Leaves the text of samples out: a document is its media, and nothing ends it. For models that read no text."""

    def __init__(self) -> None:
        self.vocabulary, self.end, self.pad, self.begin = 1, 0, 0, ()
        self.fingerprint = _fingerprint(RULES, type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def render(self, sample: Sample) -> list[Piece]:
        return [Piece((), False, part) for part in sample.media]

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class _SpecialTokens:
    """The special tokens of a tokenizer, found in trusted text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = sorted(tokenizer.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content))
        tokens = [(number, token) for number, token in tokens if token.special]
        self.ids = {token.content: number for number, token in tokens}
        # Some tokens swallow the white space beside them (Phi-3 writes "<|end|>\n" and means one token).
        space = {False: "", True: r"\s*"}
        forms = [f"{space[token.lstrip]}({re.escape(token.content)}){space[token.rstrip]}" for _, token in tokens]
        self.pattern = re.compile("|".join(forms) or r"(?!)")

    def cut(self, span: _Span) -> Iterator[_Laid]:
        """The text between special tokens, and the tokens as pieces."""
        position = 0
        for match in self.pattern.finditer(span.text):
            yield span._replace(text=span.text[position : match.start()])
            yield Piece((self.ids[match[match.lastindex or 0]],), span.loss)
            position = match.end()
        yield span._replace(text=span.text[position:])


# ------------------------------------------------------------------------------------------------------------- loading


def _read(path: str) -> tuple[str, dict[str, str], str | None]:
    """Definition, special roles and chat template of a tokenizer."""
    try:
        found = locate(path) if path.startswith(PACKAGE) or Path(path).expanduser().exists() else None
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"tokenizer: {error}") from error
    if found is not None and found.is_file():
        try:
            tokenizer, roles, template = read_tokenizer(found)
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


def _named_template(name: str) -> str:
    if name == "chatml":
        return CHATML
    if "{{" in name or "{%" in name:
        return name
    return find_preset(name).read_text(encoding="utf-8")


def _text_only(definition: str) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers that take special tokens for plain text: one for the start of a document, one for within it.

    They differ for SentencePiece models only, which put a space before the first word of a document and nowhere else.
    """
    content = json.loads(definition)
    # Truncation and padding would change lengths; the post-processor adds tokens and trims spaces off the offsets.
    content |= {"truncation": None, "padding": None, "post_processor": None}
    opening = Tokenizer.from_str(json.dumps(content))
    opening.encode_special_tokens = True
    if '"prepend_scheme": "first"' not in json.dumps(content["pre_tokenizer"]):
        return opening, opening
    inner = json.loads(
        json.dumps(content["pre_tokenizer"]).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    )
    tokenizer = Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": inner}))
    tokenizer.encode_special_tokens = True
    return opening, tokenizer


def _fingerprint(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _bears_loss(part: Part) -> bool:
    return isinstance(part, Codes) or (isinstance(part, Text) and part.loss)


def _ends_with_loss(parts: Sequence[Part]) -> bool:
    """Whether the last words or codes bear loss, so that the model is to learn that nothing follows them."""
    ids = [part for part in parts if isinstance(part, Text | Codes)]
    return bool(ids) and _bears_loss(ids[-1])


def _stripped(parts: list[Part]) -> list[Part]:
    """The parts of a message without white space at its two ends."""
    if isinstance(parts[0], Text):
        parts[0] = replace(parts[0], text=parts[0].text.lstrip())
    if isinstance(parts[-1], Text):
        parts[-1] = replace(parts[-1], text=parts[-1].text.rstrip())
    return parts


# ------------------------------------------------------------------------------------------------------ chat templates


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``, by which templates mark what the assistant says: plain content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(template: str) -> Any:
    """A chat template in the dialect of transformers, sandboxed.

    `strftime_now` is left out on purpose: a document with today's date would not have the length that the plan promised
    yesterday. Templates fall back to a fixed date where it is undefined.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
