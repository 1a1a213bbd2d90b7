"""Evaluation: choice suites, what models make of them, and the controls that say what a figure is worth."""

from __future__ import annotations

from mm.evaluate.answerer import Answerer, Prompt, Scored, ScoredQuestion
from mm.evaluate.baselines import FrozenFeatures
from mm.evaluate.build import CaptionedPicture, build_choice_suite
from mm.evaluate.report import Answered, Results
from mm.evaluate.run import Options, evaluate
from mm.evaluate.suite import Question, Settings, Suite, SuiteError, read_suite, write_suite

__all__ = [
    "Answered",
    "Answerer",
    "CaptionedPicture",
    "FrozenFeatures",
    "Options",
    "Prompt",
    "Question",
    "Results",
    "Scored",
    "ScoredQuestion",
    "Settings",
    "Suite",
    "SuiteError",
    "build_choice_suite",
    "evaluate",
    "read_suite",
    "write_suite",
]
