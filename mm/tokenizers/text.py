"""Text to token ids: samples become documents of pieces, chats through the model's own template.

    Sample ──lay out──▶ spans of text │ media ──join, cut at control words──▶ runs ──encode──▶ pieces
                        (loss? trusted?)

A *span* is text from one origin: the words of a sample are untrusted, what a chat template or the recipe puts around
them is trusted. Control words (`mm.tokenizers.words`) are recognised in trusted text only, so that a caption that
contains ``<|im_end|>`` cannot end a turn. Neighbouring spans are encoded together, as one text, and the loss is laid
over the tokens by their offsets: ids are those that the model's own tokenizer gives for the whole text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mm.configure import RecipeError
from mm.sample import BrokenSample, Codes, MediaPart, Modality, Part, Sample, Text
from mm.tokenizers.reading import named_template, read_tokenizer
from mm.tokenizers.templates import TemplateFailed, TemplateRefuses, render
from mm.tokenizers.words import ControlWords, tokenizers_of_words

RULES = 2
"""Version of the rules in this file, part of the fingerprint: raise it when a change gives a sample other ids."""


UNSPELLABLE = "\U0010fffd"
"""A character without a meaning, which no vocabulary holds: it becomes bytes, nothing, or the unknown token."""


class ChatError(ValueError):
    """A chat that the template cannot render exactly; the message says which and why."""


class RefusedChat(ChatError, BrokenSample):
    """A chat that the template itself refuses, for the order of its roles; other chats are fine."""


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
    control_words: added tokens, such as ``<think>``, that the words of samples may become. All others are spelled out
        in them, also those that the tokenizer does not call special
    words_only: leave media out of documents, see `WordsOnly`
    """

    path: str
    template: str | None = None
    end: str | None = None
    begin: str | None = None
    around: dict[str, Around] = field(default_factory=dict)
    control_words: list[str] = field(default_factory=list)
    words_only: bool = False

    def __post_init__(self) -> None:
        allowed = [modality.label for modality in Modality if modality is not Modality.TEXT]
        for name in self.around:
            if name not in allowed:
                raise RecipeError(f"`around` names {name!r}; expected {', '.join(allowed)}")


class _Span(NamedTuple):
    """Text of one origin. Control words are recognised in trusted text only."""

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
        control_words: Sequence[str] = (),
    ) -> None:
        """
        Args:
            definition: the content of a ``tokenizer.json``.
            roles: names of special tokens, ``{"eos_token": "<|im_end|>", …}``, as chat templates use them.
        """
        self._arguments = (definition, roles, template, end, begin, around, control_words)
        whole = self._whole = Tokenizer.from_str(definition)
        self._control = ControlWords(whole)
        self._control.check_known(control_words)
        self._opening, self._inner, self._unknown = tokenizers_of_words(definition, control_words)
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
            RULES,
            definition,
            roles,
            template,
            name,
            self.begin,
            repr(sorted(self._around.items())),
            sorted(control_words),
        )
        self._check_that_words_stay_words(control_words)

    @classmethod
    def load(cls, options: TokenizerOptions | str) -> TextTokenizer:
        """The tokenizer of a folder, a hub name or a GGUF file.

        Raises:
            RecipeError: not there, not a fast tokenizer, or no end token.
        """
        if isinstance(options, str):
            options = TokenizerOptions(options)
        definition, roles, template = read_tokenizer(options.path)
        if options.template is not None:
            template = named_template(options.template)
        kind = WordsOnly if options.words_only else cls
        return kind(
            definition, roles, template, options.end, options.begin, options.around, tuple(options.control_words)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    # ------------------------------------------------------------------------------------------------- plain text

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text: never a control word that the recipe does not allow, whatever it contains."""
        return self._opening.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control words included."""
        return self._whole.decode(list(ids), skip_special_tokens=False)

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
        *_, last = self._control.find(closing[: self._end_of_turn(closing)])
        return frozenset({self.end, last.id})

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
        token = next((found for found in self._control.find(closing) if found.special), None)
        if token is None or closing[: token.start].strip():
            raise ChatError(
                f"the chat template writes {closing[:40]!r} after the assistant's words, which starts with no special "
                f"token of the tokenizer: the model would never learn to end its turn"
            )
        return token.end

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
            text = render(self._template, messages, prompt, self._roles)
        except TemplateRefuses as error:
            raise RefusedChat(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error
        except TemplateFailed as error:
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
        """Spans that are encoded together, and the control words and media between them; with whether a run opens."""
        run: list[_Span] = []
        opening = True
        for item in laid:
            for cut in [item] if isinstance(item, Piece) or not item.trusted else self._cut(item):
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

    def _cut(self, span: _Span) -> Iterator[_Laid]:
        """The text between the control words of a trusted span, and these as pieces."""
        position = 0
        for found in self._control.find(span.text):
            yield span._replace(text=span.text[position : found.start])
            yield Piece((found.id,), span.loss)
            position = found.end
        yield span._replace(text=span.text[position:])

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

    def _check_that_words_stay_words(self, allowed: Collection[str]) -> None:
        """No control word may come of its own spelling, and `end` not of what the vocabulary cannot spell."""
        names = {number: name for name, number in self._control.ids.items() if name not in allowed}
        harmless = {self._unknown} - {self.end}
        for text in (*names.values(), UNSPELLABLE):
            made = (names.keys() & self.encode(text)) - harmless
            if made:
                raise RecipeError(
                    f"tokenizer: plain text {text!r} becomes the control word {names[made.pop()]!r}, and so could the "
                    f"words of a sample; name a tokenizer that keeps them apart"
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
