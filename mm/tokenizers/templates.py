"""Chat templates, rendered in a process of their own that has so much time and memory and no more.

A template is a program by whoever published the tokenizer. The sandbox of jinja2 keeps it from files and from Python.
It does not bound loops inside loops, or text that doubles with every step; the limits of a process do.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template that ``template: chatml`` names, for base models that come without one."""

SECONDS = 2
"""Processor time of one rendering, which takes milliseconds."""
MEMORY = 1 << 30
"""Bytes that the process may address; Python and jinja2 take a tenth."""
LENGTH = 1 << 20
"""Characters of a rendered chat, without the words of its messages."""

START = "import sys; sys.path[:] = sys.argv[1:]; from mm.tokenizers.templates import main; main()"

_RENDERED, _REFUSED, _FAILED = "rendered", "refused", "failed"


class TemplateFailed(ValueError):
    """A template that cannot be rendered, or takes more than its limits."""


class TemplateRefuses(ValueError):
    """A template that refuses these messages, by ``raise_exception``."""


def render(template: str, messages: list[dict[str, str]], prompt: bool, names: dict[str, str]) -> str:
    """The text that a chat template gives.

    Args:
        messages: ``{"role": …, "content": …}`` each.
        prompt: whether the text ends where the assistant begins to answer.
        names: of special tokens, ``{"eos_token": …}``.

    Raises:
        TemplateRefuses: for the order of the roles, say.
        TemplateFailed: everything else that the template does wrong.
    """
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt, **names}
    outcome, text = _in_a_process(json.dumps([template, variables]))
    if outcome == _REFUSED:
        raise TemplateRefuses(text)
    if outcome == _FAILED:
        raise TemplateFailed(text)
    return text


@functools.lru_cache(maxsize=1024)
def _in_a_process(request: str) -> tuple[str, str]:
    """Outcome and text, or reason, of a rendering. Refusals are remembered too: many chats have the same roles."""
    package = Path(__file__).parents[1]
    path = [str(Path(folder).absolute()) for folder in [*sys.path, package.parent]]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", START, *path],
        input=request,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGSEGV):
        return _FAILED, f"it takes more than {SECONDS} s of processor time or {MEMORY >> 30} GiB of memory"
    if done.returncode:
        raise RuntimeError(f"the process that renders chat templates failed:\n{done.stderr}")
    outcome, text = json.loads(done.stdout)
    return outcome, text


def main() -> None:
    """Render the request on standard input, within the limits. The program of the process."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, SECONDS)
    if sys.platform == "linux":  # others do not bound what a process addresses
        _limit(resource.RLIMIT_AS, MEMORY)
    template, variables = json.load(sys.stdin)
    with os.fdopen(1, "w", encoding="utf-8") as answer:
        json.dump(_outcome(template, variables), answer)


def _limit(kind: int, most: int) -> None:
    _, already = resource.getrlimit(kind)
    bound = most if already == resource.RLIM_INFINITY else min(most, already)
    resource.setrlimit(kind, (bound, bound))


def _outcome(template: str, variables: dict[str, Any]) -> tuple[str, str]:
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(**variables):
            parts.append(part)
            length += len(part)
            if length > LENGTH:
                return _FAILED, f"it writes more than {LENGTH:,} characters around the words"
    except _Refusal as error:
        return _REFUSED, str(error)
    except MemoryError:
        return _FAILED, f"it takes more than {MEMORY >> 30} GiB of memory"
    except Exception as error:  # a template can raise whatever an expression of Python can
        return _FAILED, str(error) or type(error).__name__
    text = "".join(parts)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return _FAILED, "it writes half a character, a lone surrogate, which no tokenizer encodes"
    return _RENDERED, text


class _Refusal(Exception):
    """What a template raises by ``raise_exception``."""


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
