"""Chat templates: rendered as transformers does, and stopped where they take too much."""

from __future__ import annotations

import time

import pytest

from mm.tokenizers.templates import LENGTH, SECONDS, TemplateFailed, TemplateRefuses, render

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def rendered(template: str) -> str:
    return render(template, MESSAGES, False, {"eos_token": "</s>"})


def test_a_template_sees_messages_names_and_filters() -> None:
    template = (
        "{%- for message in messages %}{{ message | tojson }}{{ eos_token }}{%- if loop.last %}{% break %}{% endif %}"
        "{%- endfor %}{% generation %}{{ 'ä' | tojson }}{% endgeneration %}{{ tools is none and not documents }}"
    )
    assert rendered(template) == (
        '{"role": "user", "content": "Hi"}</s>{"role": "assistant", "content": "Yes"}</s>"ä"True'
    )


def test_a_refusal_is_the_templates_own() -> None:
    with pytest.raises(TemplateRefuses, match="no such turn"):
        rendered("{{ raise_exception('no such turn') }}")


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set a = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set a.t = a.t ~ a.t %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NESTED + "{% endfor %}", "processor time"),
        ("{{ 10 ** (10 ** 9) }}", "processor time"),
        (DOUBLED, "memory"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ 'a' | center(10 ** 10) }}", "memory"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", f"more than {LENGTH:,} characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ {}['a'].b }}", "no attribute 'a'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing_here() }}", "undefined"),
        (r"{{ '\ud800' }}", "half a character"),
    ],
)
def test_a_template_that_takes_too_much_or_goes_wrong_fails_in_time(template: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateFailed) as caught:
        rendered(template)
    assert said in str(caught.value)
    assert time.monotonic() - started < 20 * SECONDS  # of a busy machine


def test_a_chat_of_the_same_roles_is_rendered_once() -> None:
    template = "{% for message in messages %}{{ message.role }}{% endfor %}{{ raise_exception('never') }}"
    started = time.monotonic()
    for _ in range(1000):
        with pytest.raises(TemplateRefuses):
            rendered(template)
    assert time.monotonic() - started < 20
