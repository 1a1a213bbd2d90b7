"""Filters: which rows of an index a recipe takes, by an expression over what is known of them.

    where: clip > 0.28 and width >= 200
      └─ Python's grammar ─▶ tree of allowed nodes ─▶ pyarrow functions over whole columns ─▶ true, false or null a row

Names are header facts of the index (`FACTS`) and computed columns (`mm.data.columns`); both describe a sample under the
first choice of its text. Numbers, texts, ``+ - * /``, comparisons (also chained), ``and or not``, ``in`` a list of
constants, ``"text" in name``, ``is None`` and ``is not None`` are all there is: nothing is called or executed.

A value that is missing (null, or no number at all) makes whatever is asked of it unknown: ``or`` may still find the row
by another condition, else it is not selected, and counted apart. Numbers that are computed with become float64.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mm.data import columns
from mm.data.index import Index
from mm.sample import Modality

MAX_CHARACTERS, MAX_DEPTH = 2000, 50
"""Longest expression, and how deep its operators may be nested."""

Value = Any
"""A pyarrow array, or a scalar that holds for all rows."""

Node = Any
"""Of `ast`."""


class WhereError(ValueError):
    """A filter that cannot be used, or that selects nothing; the message says why and what is allowed."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What a filter says of the n rows of an index.

    selected: (n,) bool
    missing: (n,) bool, rows that are not selected because a value is missing
    expression: in one spelling, however it was spaced
    columns: fingerprints of the computed columns that it names
    """

    selected: np.ndarray
    missing: np.ndarray
    expression: str
    columns: dict[str, str]


def select(index: Index, expression: str, *, part: bool = False) -> Selection:
    """The rows of an index that an expression selects.

    Args:
        part: the index is of some shards of a split, where no row may be selected.

    Raises:
        WhereError: the expression uses more than is allowed, names something unknown, compares a number with a text, or
            selects no row.
        ColumnError: a column that it names was computed for other rows.
    """
    tree = parse(expression)
    evaluation = _Evaluation(index, expression)
    try:
        found = evaluation.condition(tree)
    except pa.ArrowException as error:
        raise evaluation.refusal(tree, str(error)) from error
    if not evaluation.used:
        raise WhereError(f"where: {expression!r} names no column, so it says the same of every row")
    missing = np.asarray(found.is_null())
    selected = np.asarray(found.fill_null(False))
    if not selected.any() and not part:
        ranges = "; ".join(_described(name, values) for name, values in evaluation.used.items())
        raise WhereError(
            f"where: {expression!r} selects none of the {index.rows} rows of {index.card.name}/{index.split}, "
            f"{missing.sum()} of them because a value is missing; {ranges}"
        )
    return Selection(selected, missing, ast.unparse(tree), evaluation.fingerprints)


def normal_form(expression: str) -> str:
    """An expression in one spelling, however it was spaced; raises as `parse`."""
    return ast.unparse(parse(expression))


def parse(expression: str) -> ast.expr:
    """The tree of an expression, made of allowed nodes only.

    Raises:
        WhereError: it is no expression, too long or nested too deep, or has a node that is not allowed.
    """
    if len(expression) > MAX_CHARACTERS:
        raise WhereError(f"where: the expression has {len(expression)} characters, at most {MAX_CHARACTERS} are read")
    try:
        tree = ast.parse(expression.strip(), "where", "eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WhereError(f"where: {expression!r} is no expression: {getattr(error, 'msg', error)}") from error
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        for node in level:
            if problem := _problem(node):
                raise WhereError(
                    f"where: {expression!r}: {problem}; allowed are names, numbers, texts, + - * /, comparisons, "
                    "`and`, `or`, `not`, `in` and `is None`"
                )
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    raise WhereError(f"where: {expression!r} is nested more than {MAX_DEPTH} deep")


# ---------------------------------------------------------------------------------------------------------- evaluation

_COMPARISONS: dict[type, str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITHMETIC: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}
_LOGIC: dict[type, str] = {ast.And: "and_kleene", ast.Or: "or_kleene"}
_LISTS = (ast.Tuple, ast.List, ast.Set)
_ALLOWED = (
    *(*_COMPARISONS, *_ARITHMETIC, *_LOGIC, *_LISTS),
    *(ast.Compare, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Name, ast.Constant, ast.Load),
    *(ast.Not, ast.USub, ast.UAdd, ast.In, ast.NotIn, ast.Is, ast.IsNot),
)


def _problem(node: ast.AST) -> str | None:
    """Why a node is not allowed."""
    if isinstance(node, ast.Constant):
        if node.value is not None and type(node.value) not in (bool, int, float, str):
            return f"{node.value!r} is no number and no text"
        if type(node.value) is int and node.value >= 2**63:
            return "a whole number of more than 63 bits"
    elif not isinstance(node, _ALLOWED):
        what = f"`{ast.unparse(node)}`" if isinstance(node, ast.expr) else type(node).__name__
        return f"{what} is not allowed ({type(node).__name__})"
    return None


def _apply(function: str, *values: Value) -> Value:
    """A function of pyarrow on whole columns; null where a value is, unless it is one of Kleene's logic."""
    return pc.call_function(function, list(values))


def _compared(function: str, one: Value, other: Value) -> Value:
    """A comparison; of a float32 column with a constant in float32, so that 0.9 is what was stored as 0.9."""
    if pa.types.is_float32(one.type) and isinstance(other, pa.DoubleScalar):
        other = other.cast(pa.float32())
    if pa.types.is_float32(other.type) and isinstance(one, pa.DoubleScalar):
        one = one.cast(pa.float32())
    return _apply(function, one, other)


class _Evaluation:
    """An expression over the columns of one index.

    used: the columns that it named, by name; fingerprints: of those that were computed
    """

    def __init__(self, index: Index, expression: str) -> None:
        self.index = index
        self.expression = expression
        self.used: dict[str, Value] = {}
        self.fingerprints: dict[str, str] = {}

    def refusal(self, node: ast.expr, why: str) -> WhereError:
        return WhereError(f"where: {self.expression!r}: `{ast.unparse(node)}`: {why}")

    def condition(self, node: ast.expr) -> Value:
        """Truth of an expression: booleans and nulls."""
        value = self.value(node)
        if not pa.types.is_boolean(value.type):
            raise self.refusal(node, f"is {_kind(value)}, not a condition; compare it with something")
        return value

    def number(self, node: ast.expr) -> Value:
        value = self.value(node)
        if _kind(value) != "a number":
            raise self.refusal(node, f"is {_kind(value)}, not a number")
        return pc.cast(value, pa.float64())

    def value(self, node: Node) -> Value:
        match node:
            case ast.Name(id=name):
                return self.column(name)
            case ast.Constant(value=None):
                raise self.refusal(node, "write `is None` or `is not None` after a name")
            case ast.Constant(value=constant):
                return pa.scalar(constant)
            case ast.BoolOp(op=op, values=values):
                result = self.condition(values[0])
                for other in values[1:]:
                    result = _apply(_LOGIC[type(op)], result, self.condition(other))
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _apply("invert", self.condition(operand))
            case ast.UnaryOp(op=op, operand=operand):
                number = self.number(operand)
                return _apply("negate", number) if isinstance(op, ast.USub) else number
            case ast.BinOp(left=left, op=op, right=right):
                return _without_nan(_apply(_ARITHMETIC[type(op)], self.number(left), self.number(right)))
            case ast.Compare(left=left, ops=ops, comparators=others):
                result = None
                for op, other in zip(ops, others, strict=True):
                    holds = self.comparison(left, op, other)
                    result = holds if result is None else _apply("and_kleene", result, holds)
                    left = other
                return result
        raise self.refusal(node, "a list may only stand after `in`")

    def comparison(self, left: Node, op: ast.cmpop, right: Node) -> Value:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self.refusal(right, "`is` goes with `None` only; write ==")
            value = self.value(left)
            return _apply("is_null" if isinstance(op, ast.Is) else "is_valid", value)
        if isinstance(op, ast.In | ast.NotIn):
            holds = self.membership(left, right)
            return holds if isinstance(op, ast.In) else _apply("invert", holds)
        one, other = self.value(left), self.value(right)
        if _kind(one) != _kind(other):
            raise self.refusal(
                ast.Compare(left, [op], [right]), f"compares {_kind(one)} with {_kind(other)}, which never agree"
            )
        return _compared(_COMPARISONS[type(op)], one, other)

    def membership(self, left: Node, right: Node) -> Value:
        if isinstance(right, _LISTS):
            value = self.value(left)
            options = [self.constant(option) for option in right.elts]
            if not options:
                raise self.refusal(right, "an empty list holds nothing")
            for option, node in zip(options, right.elts, strict=True):
                if _kind(pa.scalar(option)) != _kind(value):
                    raise self.refusal(node, f"is {_kind(pa.scalar(option))} in a list for {_kind(value)}")
            equal = [
                _compared("equal", value, pa.scalar(option)) for option in options
            ]  # null stays null, unlike with is_in
            result = equal[0]
            for other in equal[1:]:
                result = _apply("or_kleene", result, other)
            return result
        if isinstance(left, ast.Constant) and isinstance(left.value, str):
            value = self.value(right)
            if _kind(value) != "a text":
                raise self.refusal(right, f"is {_kind(value)}; a text can only be looked for in a text")
            return pc.call_function("match_substring", [value], pc.MatchSubstringOptions(left.value))
        raise self.refusal(right, "`in` needs a list of constants after it, or a text before it")

    def constant(self, node: Node) -> bool | int | float | str:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
        raise self.refusal(node, "a list may hold constants only")

    def column(self, name: str) -> Value:
        """The values of a header fact or of a computed column.

        Raises:
            WhereError: no such name, or more than one column of it.
        """
        if name not in self.used:
            fingerprints = columns.fingerprints(self.index, name)
            if len(fingerprints) > 1 or (fingerprints and name in FACTS):
                of = [*(["a header fact"] if name in FACTS else []), *map(repr, fingerprints)]
                raise WhereError(
                    f"where: {self.expression!r}: {name} could be {len(of)} columns: {', '.join(of)}. Delete those "
                    f"that you do not mean, under {self.index.folder / 'columns'}, or compute under another name"
                )
            if fingerprints:
                self.fingerprints[name] = fingerprints[0]
                values = columns.load(self.index, name, fingerprints[0])
            elif name in FACTS:
                values = FACTS[name](self.index)
            else:
                raise WhereError(self._unknown(name))
            if pa.types.is_dictionary(values.type):
                values = values.cast(values.type.value_type)
            if pa.types.is_float16(values.type):
                values = values.cast(pa.float32())
            if _kind(values) not in _KINDS:
                raise WhereError(f"where: {self.expression!r}: {name} holds {values.type}, which cannot be compared")
            self.used[name] = _without_nan(values)
        return self.used[name]

    def _unknown(self, name: str) -> str:
        known = [*FACTS, *columns.names(self.index)]
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return (
            f"where: {self.expression!r}: no column {name!r} of {self.index.card.name}/{self.index.split}.{hint} "
            f"There are {', '.join(known)}"
        )


_KINDS = ("a truth value", "a number", "a text")


def _kind(value: Value) -> str:
    kind = value.type
    if pa.types.is_boolean(kind):
        return "a truth value"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "a number"
    return "a text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)


def _without_nan(value: Value) -> Value:
    """The value with null for what is no number, so that nothing can be said of it, not even by `not`."""
    if not pa.types.is_floating(value.type):
        return value
    return _apply("if_else", _apply("is_nan", value), pa.scalar(None, value.type), value)


def _described(name: str, values: Value) -> str:
    if _kind(values) != "a number":
        return f"{name} is {_kind(values)}"
    least, most = _apply("min_max", values).values()
    return f"{name} is missing everywhere" if not least.is_valid else f"{name} is {least.as_py():g} to {most.as_py():g}"


# --------------------------------------------------------------------------------------------------------------- facts


def _smallest(modality: Modality, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Index], pa.Array]:
    """A fact of the items of a modality, the smallest where a sample has several, missing where it has none."""

    def values(index: Index) -> pa.Array:
        rows, media = _items(index, modality)
        found = value(media)
        least = np.full(index.rows, np.inf if found.dtype.kind == "f" else np.iinfo(np.int64).max, found.dtype)
        np.minimum.at(least, rows, found)
        return pa.array(least, mask=np.bincount(rows, minlength=index.rows) == 0)

    return values


def _number(modality: Modality) -> Callable[[Index], pa.Array]:
    """How many items of a modality a sample has."""
    return lambda index: pa.array(np.bincount(_items(index, modality)[0], minlength=index.rows))


def _items(index: Index, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """(k,) int64 rows that items of a modality belong to, and (k, 2) int64 facts of the items."""
    mine = index.media[:, 0] == modality
    rows = np.repeat(np.arange(index.rows), np.diff(index.media_starts))
    return rows[mine], index.media[mine, 1:].astype(np.int64)


FACTS: dict[str, Callable[[Index], Any]] = {
    "key": lambda index: index.key,
    "characters": lambda index: pa.array(index.characters[:, 0]),
    "images": _number(Modality.IMAGE),
    "width": _smallest(Modality.IMAGE, lambda facts: facts[:, 0]),
    "height": _smallest(Modality.IMAGE, lambda facts: facts[:, 1]),
    "recordings": _number(Modality.SPEECH),
    "frames": _smallest(Modality.SPEECH, lambda facts: facts[:, 0]),
    "seconds": _smallest(Modality.SPEECH, lambda facts: facts[:, 0] / np.maximum(facts[:, 1], 1)),
    "clouds": _number(Modality.POINT),
    "points": _smallest(Modality.POINT, lambda facts: facts[:, 0]),
}
"""What the index knows of a row, by name: the label; characters of all text; numbers of pictures, recordings and point
clouds; pixels, frames and seconds, points. Of several items the smallest counts, in each respect, so that
``width >= 200`` holds for every picture of a sample."""
