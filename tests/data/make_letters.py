"""Writes letters.jsonl: synthetic answers and what ms-vlmeval 0.0.20 makes of them.

Run it with a Python that has ms-vlmeval 0.0.20 (``can_infer`` and ``YOrN_Extraction`` are its scorers):

    python tests/data/make_letters.py tests/data/letters.jsonl 2000

The first line holds the option sets; every other is [option set, answer, letter or null], or ["yes/no", answer, word or
null].
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from vlmeval.dataset.utils.yorn import YOrN_Extraction
from vlmeval.utils.matching_util import can_infer

OPTION_SETS = [
    ["red", "green", "blue", "black"],
    ["A dog on a beach", "A cat on a sofa", "Two dogs", "A boat"],
    ["yes", "no"],
    ["1", "2", "3", "12", "21"],
    ["a bus", "a busy street", "bus"],
    ["B flat", "C sharp", "A minor", "D", "none of the above"],
    ["the Eiffel Tower in Paris at night", "Big Ben", "a bridge"],
    ["ÉCOLE", "straße", "İstanbul", "大きい犬"],
    [str(number) for number in range(20, 46)],
]
FRAMES = [
    *(
        "{x}",
        "{x}.",
        "({x})",
        "**{x}**",
        "[{x}]",
        "{{{x}}}",
        "{x}:",
        "#{x}",
        "{x}!",
        "{x}?",
        "'{x}'",
        "<{x}>",
        "\n{x}\n",
    ),
    *("Answer: {x}", "The answer is {x}.", "the correct option is ({x})", "Option {x}. {t}", "{x}. {t}", "{x} {t}"),
    *(
        "I think it is {x}, {t}",
        "{x} because I see {t} in the picture",
        "{x} and {y}",
        "{x} or {y}?",
        "not {x} but {y}",
    ),
    *("The color is {t}", "{t}", "{t}.", "It shows {t} and {u}", "a {t} thing", "{T}", "I see {T}, so {x}", "A {t}"),
    *(
        "A picture of a {t}",
        "A picture of dog",
        "A picture of a dog",
        "A {t} in a picture",
        "{x} A",
        "A {x}",
        "Z",
        "(Z)",
    ),
    *("Z {x}", "Z {t}", "none", "", "   ", "I do not know.", "{x} is the one that I would choose here", "{l}", "{l}."),
    *("I can't process this file.", "Cannot determine the answer", "I'm sorry, but without the image provided {x}"),
    *("Sorry, I can't help with images of people yet. {x}", "Failed to obtain answer via API. {x}"),
    *("Failed to obtain answer via API {t}", "{x}{y}", "{x},{y}", "{x};", "{x}-{y}", "{x}/{y}", "{x} {x}", "{t} {t}"),
    *("one two three four {x}", "{x} one two three", "{x} one two three four", "{x} one {x} two three four five six"),
    "Let us look at the picture closely. There are many things in it. {t} " * 4 + "{x}",
    "word " * 40 + "{t}",
]
YES_NO = [
    "yes",
    "no",
    "Yes",
    "NO",
    "yes,",
    "no.",
    "not",
    "know",
    "yes/no",
    "Yes; it is",
    "No-one",
    "yes!",
    "1,000",
    "3.5",
    ".",
]
WORDS = [
    *YES_NO,
    "the",
    "answer",
    "is",
    "(yes)",
    "[no]",
    "a.b",
    "yes.no",
    "no?",
    "<yes>",
    "it",
    "=",
    "-",
    "yes_",
    "...no",
]


def letter_case(random: random.Random) -> list:
    number = random.randrange(len(OPTION_SETS))
    options = OPTION_SETS[number]
    letters = [chr(65 + position) for position in range(len(options))]
    x, y = random.choice(letters), random.choice([*letters, "E", "I", "Z"])
    t, u = random.choice(options), random.choice(options)
    frames = [random.choice(FRAMES) for _ in range(random.choice((1, 1, 1, 2)))]
    answer = " ".join(frames).format(x=x, y=y, t=t, u=u, T=t.upper(), l=x.lower())
    return [number, answer, can_infer(answer, dict(zip(letters, options, strict=True))) or None]


def yes_no_case(random: random.Random) -> list:
    dots = "." * random.choice((0, 0, 0, 31, 32, 33))
    answer = dots + " ".join(random.choice(WORDS) for _ in range(random.choice((1, 2, 3, 6, 40))))
    word = YOrN_Extraction(answer)
    return ["yes/no", answer, None if word == "Unknown" else word]


if __name__ == "__main__":
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    draw = random.Random(0)
    cases = {}
    while len(cases) < count:
        case = yes_no_case(draw) if draw.random() < 0.2 else letter_case(draw)
        cases[case[0], case[1]] = case
    lines = [OPTION_SETS, *cases.values()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
