"""Choosing an option by its likelihood.

    sum              log p(option | picture, prompt)
    per_token        the same, divided by the option's tokens
    minus_text_only  log p(option | picture, prompt) − log p(option | prompt): what the picture adds

Options that share the highest score share the credit: the right one earns 1/k if it is among k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mm.evaluate.answerer import Answerer, Scored, ScoredQuestion
from mm.evaluate.suite import Question, Rule
from mm.terminal import Progress

MOST_OPTIONS = 64
"""Options of one `ScoredQuestion`; more are asked in several."""

SCORES: dict[Rule, Callable[[Scored, Scored], float]] = {
    "sum": lambda shown, withheld: shown.logprob,
    "per_token": lambda shown, withheld: shown.logprob / shown.tokens,
    "minus_text_only": lambda shown, withheld: shown.logprob - withheld.logprob,
}
"""Score of an option from its likelihood with the picture shown and with it withheld."""

TEXT_ONLY: dict[Rule, Rule] = {"sum": "sum", "per_token": "per_token", "minus_text_only": "sum"}
"""The rule of the text-only control. `minus_text_only` would be 0 for all options: its control is what it subtracts."""


def option_scores(rule: Rule, shown: Sequence[Scored], withheld: Sequence[Scored]) -> tuple[float, ...]:
    """One score an option, under a rule."""
    return tuple(map(SCORES[rule], shown, withheld))


def credit(scores: Sequence[float], answer: int) -> float:
    """1 if the answer has the highest score alone, 1/k if k options share it, else 0."""
    best = max(scores)
    return 1 / scores.count(best) if scores[answer] == best else 0.0


def likelihood_prompt(template: str, question: Question) -> str:
    """The text between picture and option: the template with ``{question}`` and ``{hint}`` filled in."""
    return template.replace("{question}", question.text).replace("{hint}", question.hint)


def distinct(questions: Sequence[ScoredQuestion]) -> list[ScoredQuestion]:
    """The same questions with every (picture, prompt, option) once; those of one picture follow each other."""
    options: dict[bytes | None, dict[str, dict[str, None]]] = {}
    for question in questions:
        prompts = options.setdefault(question.picture, {})
        prompts.setdefault(question.prompt, {}).update(dict.fromkeys(question.options))
    return [
        ScoredQuestion(picture, prompt, tuple(wanted)[start : start + MOST_OPTIONS])
        for picture, prompts in options.items()
        for prompt, wanted in prompts.items()
        for start in range(0, len(wanted), MOST_OPTIONS)
    ]


def score_once(
    answerer: Answerer, questions: Sequence[ScoredQuestion], batch: int, progress: Progress
) -> list[tuple[Scored, ...]]:
    """What `answerer.score` says of each question's options, having asked each (picture, prompt, option) once.

    Raises:
        ValueError: the answerer left something out, or gave a likelihood that is no number or an option without tokens.
    """
    asked = distinct(questions)
    known: dict[tuple[bytes | None, str], dict[str, Scored]] = {}
    task = progress.add_task("likelihood", total=len(asked))
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        for question, scored in zip(part, answerer.score(part), strict=True):
            for option, each in zip(question.options, scored, strict=True):
                if not math.isfinite(each.logprob) or each.tokens < 1:
                    raise ValueError(
                        f"option {option!r} after {question.prompt!r} scored {each}; it cannot be compared"
                    )
                known.setdefault((question.picture, question.prompt), {})[option] = each
        progress.advance(task, len(part))
    return [
        tuple(known[question.picture, question.prompt][option] for option in question.options) for question in questions
    ]
