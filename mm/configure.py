"""Recipes: YAML files merged over typed dataclasses, and components chosen by class path.

    recipe.yaml ──read──▶ nodes ──presets, overrides──▶ nodes ──${…}──▶ mapping ──typed──▶ dataclass
                                                                                  Component ──build──▶ object

One rule on top of YAML: **where a mapping is expected, a path names the preset file that holds it**, and a mapping may
say ``preset: path`` beside the keys in which it differs. Laying one file over another, a mapping merges key by key,
everything else replaces what stood there; a mapping that names another ``_target_`` replaces as well, because options
of one class mean nothing to the next. ``null`` takes an entry out of a mapping of named things, such as a source that
a preset names. A command-line override ``a.b=1`` is a one-line recipe laid over the file.

Every value remembers the file and line that it came from, so that an error can say where to look.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mm.allow import AllowError, import_allowed
from mm.bounds import FINITE, WHOLE, Between

T = TypeVar("T")

Component = Annotated[dict[str, Any], "component"]
"""Type of a dataclass field that holds ``{_target_: package.module.Class, option: value, …}``; see `build`."""

PRESET_FOLDERS = ("encoders", "tokenizers", "packing", "train")
SIZE_LIMIT = 1 << 20
"""Largest YAML file that is read, in bytes."""
WHOLE_DIGITS = 4300
"""Digits of a whole number that Python reads at most."""
DEPTH_LIMIT = 64
"""Levels of lists and mappings in a YAML file at most."""
VALUE_LIMIT = 100_000
"""Values in a YAML file at most."""

LONGEST_SHOWN = 200
"""Characters of a value in a message."""


class RecipeError(ValueError):
    """A recipe that cannot be used. Names the key, the file and line, the value found and what is allowed."""


# ------------------------------------------------------------------------------------------------------ entry points


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The recipe at `path` (looked up like a preset) as an instance of the dataclass `schema`.

    Args:
        overrides: ``a.b=value`` strings, the value in YAML; ``stages.0.lr=1e-4`` reaches into a list.

    Raises:
        RecipeError: unknown key, wrong type, missing mandatory key, missing preset or malformed YAML.
    """
    node = _compose(schema, path, overrides)
    return _typed(schema, _interpolated(node), _Place((), node))


def resolve(path: str | Path, overrides: Sequence[str] = (), schema: Any = None) -> dict[str, Any]:
    """The merged mapping before typing, presets expanded and interpolations resolved.

    Without a `schema` nobody knows where a mapping is expected: then only explicit ``preset:`` keys are expanded.
    """
    return _interpolated(_compose(schema, path, overrides))


def typed(schema: type[T], mapping: Mapping[str, Any]) -> T:
    """An instance of the dataclass `schema` from a resolved mapping, such as `dump` gives."""
    return _typed(schema, dict(mapping), _Place((), None))


def derive(instance: T, changes: Mapping[str, Any]) -> T:
    """The instance with `changes` laid over it, as a recipe is laid over its preset.

    Raises:
        RecipeError: as `load`.
    """
    nowhere = _Node(None, None)
    changed = _noded(_escaped(dict(changes)), nowhere)
    node = _laid_over(_noded(_escaped(dump(instance)), nowhere), changed, type(instance), ())
    return _typed(type(instance), _interpolated(node), _Place((), None))


def dump(instance: Any) -> Any:
    """Plain dicts, lists and scalars that `typed` turns back into an equal instance."""
    if is_dataclass(instance) and not isinstance(instance, type):
        return {field.name: dump(getattr(instance, field.name)) for field in fields(instance) if field.init}
    if isinstance(instance, Mapping):
        return {key: dump(value) for key, value in instance.items()}
    if isinstance(instance, list | tuple):
        return [dump(value) for value in instance]
    return str(instance) if isinstance(instance, Path) else instance


def to_yaml(instance: Any) -> str:
    """The complete recipe of an instance as YAML, which `load` reads back to an equal instance."""
    return write_yaml(_escaped(dump(instance)))


def read_yaml(file: Path) -> Any:
    """The plain values in a YAML file that may come from anybody, such as a data card; None if it is empty.

    The file has at most `SIZE_LIMIT` bytes. Scalars are those of YAML 1.2. Keys are text, and each is given once.

    Raises:
        RecipeError: malformed YAML, a repeated key, an alias, a tag or too deep nesting; names file and line.
        FileNotFoundError: there is no such file.
    """
    return _plain(_read(file))


def parse_yaml(text: str) -> Any:
    """The plain values in a YAML text, read as `read_yaml` reads a file."""
    return _plain(_parse(text, None))


def write_yaml(value: Any) -> str:
    """Plain values as YAML without aliases, which `read_yaml` reads back to equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ----------------------------------------------------------------------------------------------------------- presets


class Preset(NamedTuple):
    """A preset file: the path a recipe names it by, where it lies, and the first comment line in it."""

    path: str
    file: Path
    description: str


def preset_roots() -> list[Path]:
    """Where presets are looked up, in order: working directory, the checkout around ``mm/``, the wheel's copy."""
    package = Path(__file__).parent
    checkout = [package.parent] if (package.parent / "pyproject.toml").is_file() else []
    return [Path.cwd(), *checkout, package / "presets"]


def find_preset(path: str | Path) -> Path:
    """The file that `path` names.

    Raises:
        RecipeError: no such file in any of `preset_roots`; names the places and the nearest preset.
    """
    roots = preset_roots()
    for root in roots:
        if (root / path).is_file():
            return root / path
    known = [preset.path for group in presets().values() for preset in group]
    places = ", ".join(dict.fromkeys(str(root) for root in roots))
    raise RecipeError(f"No file {str(path)!r} in {places}.{_suggestion(str(path), known)}")


def presets() -> dict[str, list[Preset]]:
    """All presets by folder; one in the working directory hides one of the same path further down the lookup."""
    found: dict[str, list[Preset]] = {}
    for folder in PRESET_FOLDERS:
        files: dict[str, Path] = {}
        for root in preset_roots():
            for file in filter(Path.is_file, (root / folder).glob("**/*.yaml")):
                files.setdefault(file.relative_to(root).as_posix(), file)
        found[folder] = [Preset(path, file, _description(file)) for path, file in sorted(files.items())]
    return found


def _description(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:  # any file of the working directory
        lines = stream.read(SIZE_LIMIT).splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


# -------------------------------------------------------------------------------------------------------- components


def build(spec: Mapping[str, Any], base: type[T], *args: Any, **extra: Any) -> T:
    """The object that ``{_target_: package.module.Class, option: value, …}`` describes.

    `_target_` is a subclass of `base`, or a class method of one (``package.module.Class.load``). `args` and `extra` are
    what the suite passes itself; the options must fit the other parameters, and their values the annotations.

    Raises:
        RecipeError: target missing, not importable or no `base`; option unknown, missing or of the wrong type.
    """
    target = spec.get("_target_")
    if not isinstance(target, str):
        raise RecipeError(f"Expected a mapping with `_target_`, the path of a {base.__name__} class; found {spec!r}.")
    factory = _imported(target, base)
    function = factory.__init__ if isinstance(factory, type) else factory
    parameters = inspect.signature(factory).parameters
    given = inspect.signature(factory).bind_partial(*args, **extra).arguments
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = {name: p for name, p in parameters.items() if p.kind in kinds and name not in given}
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    hints = _annotations(function)
    options = {}
    for name, value in spec.items():
        if name == "_target_":
            continue
        if name in given:
            raise RecipeError(f"{target}: option `{name}` is set by the suite; remove it from the recipe.")
        if name not in own and not is_open:
            raise RecipeError(f"{target}: unknown option `{name}`.{_allowed(own)}{_suggestion(name, own)}")
        options[name] = _typed(hints.get(name, Any) if name in own else Any, value, _Place((target, name), None))
    missing = [name for name, p in own.items() if p.default is p.empty and name not in options]
    if missing:
        raise RecipeError(f"{target}: missing option {', '.join(f'`{name}`' for name in missing)}.{_allowed(own)}")
    product = factory(*args, **options, **extra)
    if not isinstance(product, base):
        raise RecipeError(f"{target} gave a {type(product).__name__}, expected a {base.__name__}.")
    return product


def _imported(target: str, base: type[T]) -> Callable[..., T]:
    """The class or class method at a dotted path. Checked before anything is called."""
    if target.partition(".")[0] in sys.stdlib_module_names:  # some of them open a browser when imported
        raise RecipeError(
            f"`_target_: {target}` is not a {base.__module__}.{base.__name__}: no module of Python's own library is."
        )
    module, names = _module(target)
    found: Any = module
    for name in names:
        if not hasattr(found, name):
            classes = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c != base]
            hint = _allowed(classes) + _suggestion(name, classes)
            raise RecipeError(f"`_target_: {target}`: {module.__name__} has no {name!r}.{hint}")
        found = getattr(found, name)
    owner = found.__self__ if inspect.ismethod(found) else found
    if not (isinstance(owner, type) and issubclass(owner, base)):
        raise RecipeError(
            f"`_target_: {target}` is not a {base.__module__}.{base.__name__}: expected a subclass of it, or a class "
            f"method of such a subclass."
        )
    if found is owner and inspect.isabstract(owner):
        methods = ", ".join(sorted(getattr(owner, "__abstractmethods__", ())))
        raise RecipeError(f"`_target_: {target}` cannot be built: it does not define {methods}.")
    return found


def _module(target: str) -> tuple[types.ModuleType, list[str]]:
    """The longest importable module of a dotted path, and the names that remain."""
    names = target.split(".")
    if not all(names):
        raise RecipeError(f"`_target_: {target}`: expected package.module.Class.")
    module: types.ModuleType | None = None
    for count in range(1, len(names)):
        path = ".".join(names[:count])
        try:
            inner = import_allowed(path)
        except (ImportError, AllowError) as error:
            reason = f"importing {path} failed: {error}" if isinstance(error, ImportError) else str(error)
            raise RecipeError(f"`_target_: {target}`: {reason}") from error
        if inner is None:
            break
        module, rest = inner, names[count:]
    if module is None:
        raise RecipeError(
            f"`_target_: {target}`: no such module. Expected package.module.Class, installed or in the working "
            f"directory."
        )
    return module, rest


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a callable; none where they name what only a type checker imports."""
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return {}


# ----------------------------------------------------------------------------------------------------- reading files


@dataclass(frozen=True, slots=True)
class _Node:
    """A YAML value and where it stands.

    value: dict[str, _Node], list[_Node], or a scalar
    file: None for a command-line override
    """

    value: Any
    file: Path | None
    line: int = 0

    @property
    def where(self) -> str:
        if self.file is None:
            return "command line"
        inside = self.file.is_relative_to(Path.cwd())
        return f"{self.file.relative_to(Path.cwd()) if inside else self.file}:{self.line}"

    def fail(self, message: str) -> NoReturn:
        raise RecipeError(f"{self.where}: {message}")


_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf)$|\.nan$"
)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `1e-4` is a number, `no`, `1:30` and `2024-01-01` are text.

    Depth and number of values are bounded: the scanner looks at every open bracket again for every token.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next value and all inside it, which PyYAML reads recursively."""
        self._depth += 1
        self._values += 1
        if self._depth > DEPTH_LIMIT or self._values > VALUE_LIMIT:
            limit = "nested too deep" if self._depth > DEPTH_LIMIT else f"more than {VALUE_LIMIT:,} values"
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"{limit}, in line {mark.line + 1}")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """YAML reads the rarer line breaks as spaces unless they are escaped, which only double quotes allow."""
    style = '"' if any(rare in text for rare in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _read(file: Path) -> _Node:
    if file.exists() and not file.is_file():
        raise RecipeError(f"{file}: not a plain file; expected a YAML file.")
    with file.open("rb") as stream:
        data = stream.read(SIZE_LIMIT + 1)
    if len(data) > SIZE_LIMIT:
        raise RecipeError(f"{file}: {file.stat().st_size} bytes; a YAML file that is read has at most {SIZE_LIMIT}.")
    try:
        return _parse(data.decode("utf-8"), file)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text: {error}") from error


def _parse(text: str, file: Path | None) -> _Node:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return _Node(None, file, 1) if root is None else _converted(root, loader, file, seen=set())
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes beyond the last character
        raise RecipeError(f"{file or 'command line'}: not readable as YAML: {error}") from error


def _converted(node: yaml.Node, loader: _Loader, file: Path | None, seen: set[int]) -> _Node:
    line = node.start_mark.line + 1
    if id(node) in seen:
        # A few nested aliases unfold to billions of values; `${key}` does what a recipe needs.
        _Node(None, file, line).fail(
            "YAML aliases (*name) are not read; write the value out, or in a recipe refer to it by its key: ${key}."
        )
    seen.add(id(node))
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "int", "float", "bool", "null", "seq", "map"):
        _Node(None, file, line).fail(
            f"YAML tags ({node.tag}) are not read: a file holds text, numbers, lists, mappings."
        )
    if isinstance(node, yaml.SequenceNode):
        return _Node([_converted(item, loader, file, seen) for item in node.value], file, line)
    if not isinstance(node, yaml.MappingNode):
        return _Node(_scalar(node, loader, _Node(None, file, line)), file, line)
    entries: dict[str, _Node] = {}
    for name, child in node.value:
        at = _Node(None, file, name.start_mark.line + 1)
        if not isinstance(name, yaml.ScalarNode):
            at.fail("a list or a mapping is no key; expected text.")
        key = _scalar(name, loader, at)
        if not isinstance(key, str):
            at.fail(f"key {key!r} is not text; put it into quotes.")
        if key in entries:
            at.fail(f"key `{key}` stands twice, first in line {entries[key].line}.")
        # The line of the key, not of the value: the latter lies below when it is a mapping or a list.
        entries[key] = replace(_converted(child, loader, file, seen), line=at.line)
    return _Node(entries, file, line)


def _scalar(node: yaml.Node, loader: _Loader, at: _Node) -> Any:
    """The value of a scalar; an explicit tag such as ``!!int`` may not fit what is written."""
    try:
        value = loader.construct_object(node)
        str(value).encode()  # YAML can escape half a surrogate pair, which nothing can print or write
    except (ValueError, KeyError) as error:
        if len(node.value) > WHOLE_DIGITS and node.tag.endswith(":int"):
            at.fail(f"a number of {len(node.value):,} digits; expected one that fits in 64 bits.")
        at.fail(f"{node.value[:60]!r} cannot be read as {node.tag.rpartition(':')[2]}: {error}")
    return value


# ------------------------------------------------------------------------------------- merging, presets and overrides


def _compose(schema: Any, path: str | Path, overrides: Sequence[str]) -> _Node:
    file = find_preset(path)
    root = _laid_over(None, _read(file), schema, (file,))
    if root.value is None:
        root = replace(root, value={})
    if not isinstance(root.value, dict):
        root.fail("a recipe is a mapping of keys to values.")
    for override in overrides:
        root = _laid_over(root, _override(override), schema, (file,))
    return _with_references(root, schema)


def _with_references(node: _Node, hint: Any) -> _Node:
    """The nodes with those defaults of dataclasses that refer to other values (``"runs/${name}"``) written out."""
    hint = _container(hint)
    if isinstance(node.value, list):
        return replace(node, value=[_with_references(child, _item_type(hint, i)) for i, child in enumerate(node.value)])
    if not isinstance(node.value, dict):
        return node
    entries = {key: _with_references(child, _item_type(hint, key)) for key, child in node.value.items()}
    for name, default in _defaults(hint).items():
        if name not in entries and "${" in str(default):
            entries[name] = _noded(default, node)
    return replace(node, value=entries)


def _defaults(schema: Any) -> dict[str, Any]:
    """Default values of a dataclass, dumped."""
    known = fields(schema) if is_dataclass(schema) else ()
    plain = {field.name: field.default for field in known if field.default is not MISSING}
    made = {field.name: field.default_factory() for field in known if field.default_factory is not MISSING}
    return {name: dump(value) for name, value in (plain | made).items()}


def _noded(value: Any, at: _Node) -> _Node:
    if isinstance(value, dict):
        return replace(at, value={key: _noded(child, at) for key, child in value.items()})
    return replace(at, value=[_noded(child, at) for child in value] if isinstance(value, list) else value)


def _override(text: str) -> _Node:
    """``a.b=1`` as the nodes of ``{a: {b: 1}}``."""
    keys, equals, value = text.partition("=")
    if not equals or not all(keys.split(".")):
        raise RecipeError(f"command line: {text!r} is not of the form key=value or key.key=value.")
    node = _parse(value, None)
    for key in reversed(keys.split(".")):
        node = _Node({key: node}, None)
    return node


def _laid_over(base: _Node | None, over: _Node, hint: Any, files: tuple[Path, ...]) -> _Node:
    """`over` merged into `base`, with presets expanded. `files` are being read: naming one again is a circle."""
    hint = _container(hint)
    if isinstance(over.value, str) and _is_mapping(hint) and "${" not in over.value:
        return _preset(over, hint, files)
    if isinstance(over.value, list):
        items = [_laid_over(None, item, _item_type(hint, index), files) for index, item in enumerate(over.value)]
        return replace(over, value=items)
    if not isinstance(over.value, dict):
        return over
    if "preset" in over.value:
        rest = {key: child for key, child in over.value.items() if key != "preset"}
        return _laid_over(_preset(over.value["preset"], hint, files), replace(over, value=rest), hint, files)
    if base is not None and isinstance(base.value, list) and over.file is None:
        return _items_replaced(base, over, hint, files)
    entries = {} if base is None or _names_another_class(base, over) else dict(base.value)
    for key, child in over.value.items():
        item = _item_type(hint, key)
        if child.value is None and key in entries and not is_dataclass(hint) and _is_mapping(_container(item)):
            del entries[key]  # such as a source that a preset names
        else:
            entries[key] = _laid_over(entries.get(key), child, item, files)
    # What an override changes still stands in its file: a key that is missing there is to be written there.
    return replace(base if base is not None and over.file is None else over, value=entries)


def _preset(node: _Node, hint: Any, files: tuple[Path, ...]) -> _Node:
    if not isinstance(node.value, str):
        node.fail(f"`preset` is {node.value!r}; expected the path of a YAML file.")
    beside = node.file.parent / node.value if node.file else None
    try:
        file = beside if beside is not None and beside.is_file() else find_preset(node.value)
    except RecipeError as error:
        node.fail(f"expected a mapping, or the path of the file that holds it. {error}")
    if file in files:
        node.fail(f"{node.value!r} includes itself: {' → '.join(str(f) for f in (*files, file))}.")
    return _laid_over(None, _read(file), hint, (*files, file))


def _items_replaced(base: _Node, over: _Node, hint: Any, files: tuple[Path, ...]) -> _Node:
    items = list(base.value)
    for key, child in over.value.items():
        if not key.isdecimal() or int(key) >= len(items):
            over.fail(f"{key!r} is no place in a list of {len(items)}; expected 0 to {len(items) - 1}.")
        items[int(key)] = _laid_over(items[int(key)], child, _item_type(hint, int(key)), files)
    return replace(base, value=items)


def _names_another_class(base: _Node, over: _Node) -> bool:
    if not isinstance(base.value, dict):
        return True
    old, new = base.value.get("_target_"), over.value.get("_target_")
    return old is not None and new is not None and old.value != new.value


def _container(hint: Any) -> Any:
    """The mapping or list type within a hint such as ``Optional[X]``; None where text may stand as well."""
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        return None if str in members or Path in members else next(filter(_container, members), None)
    return hint if _is_mapping(hint) or (get_origin(hint) or hint) in (list, tuple, Sequence) else None


def _is_mapping(hint: Any) -> bool:
    return hint == Component or is_dataclass(hint) or (get_origin(hint) or hint) in (dict, Mapping)


def _item_type(hint: Any, key: str | int) -> Any:
    """Type of the value under a key of a mapping, or at a place of a list."""
    if is_dataclass(hint):
        return get_type_hints(hint, include_extras=True).get(str(key))
    arguments = get_args(hint)
    if hint == Component or not arguments:
        return None
    return arguments[1] if _is_mapping(hint) else arguments[0]


def _interpolated(node: _Node) -> dict[str, Any]:
    """Plain values of the nodes with every ``${…}`` replaced."""
    try:
        return OmegaConf.to_container(OmegaConf.create(_plain(node)), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        keys = [name for name in re.split(r"[.\[\]]", key) if name]
        raise RecipeError(f"{_Place.at(keys, node).label}: {str(error).splitlines()[0]}") from error


def _plain(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _escaped(value: Any) -> Any:
    """Values whose literal ``${`` survive interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child) for child in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------------------ typing


class _Place(NamedTuple):
    """Where a value stands: its keys, and the node that knows its file (that of an ancestor, for a missing key)."""

    keys: tuple[str, ...]
    node: _Node | None

    @classmethod
    def at(cls, keys: Iterable[str], root: _Node) -> _Place:
        place = cls((), root)
        for key in keys:
            place = place.child(key)
        return place

    def child(self, key: str | int) -> _Place:
        node = self.node
        if node is not None and isinstance(node.value, dict):
            node = node.value.get(str(key), node)
        elif node is not None and isinstance(node.value, list) and str(key).isdecimal():
            node = node.value[int(key)]
        return _Place((*self.keys, str(key)), node)

    @property
    def label(self) -> str:
        where = f"{self.node.where}: " if self.node is not None else ""
        return f"{where}`{'.'.join(self.keys)}`" if self.keys else f"{where}recipe"

    def expected(self, what: str, value: Any) -> RecipeError:
        shown = repr(value)
        shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
        return RecipeError(f"{self.label} is {shown}; expected {what}.")


def _typed(hint: Any, value: Any, place: _Place) -> Any:
    """`value` as the type that `hint` says."""
    if value == "???":
        raise RecipeError(f"{place.label} has no value yet (???); expected {_described(hint)}.")
    origin = get_origin(hint) or hint
    if origin is Annotated:
        return _component(value, place) if hint == Component else _annotated(hint, value, place)
    if origin in (Union, types.UnionType):
        return _union(hint, value, place)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            raise place.expected(_described(hint) + _suggestion(value, get_args(hint)), value)
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return _instance(hint, value, place)
    if origin in _CONVERTERS:
        return _CONVERTERS[origin](hint, value, place)
    if isinstance(origin, type) and not isinstance(value, origin):
        raise place.expected(_described(hint), value)
    return value


def _instance(schema: Any, value: Any, place: _Place) -> Any:
    if isinstance(value, schema):
        return value
    if not isinstance(value, dict):
        raise place.expected(f"a mapping ({schema.__name__})", value)
    known = {field.name: field for field in fields(schema) if field.init}
    for key in value:
        if key not in known:
            at = place.child(key)
            raise RecipeError(f"{at.label}: unknown key.{_allowed(known)}{_suggestion(key, known)}")
    hints = get_type_hints(schema, include_extras=True)
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            at = _Place((*place.keys, name), place.node)
            raise RecipeError(f"{at.label} is missing; expected {_described(hints[name])}.")
    options = {name: _typed(hints[name], child, place.child(name)) for name, child in value.items()}
    try:
        return schema(**options)
    except ValueError as error:  # a dataclass checks its own values in __post_init__
        raise RecipeError(f"{place.label}: {error}") from error


def _annotated(hint: Any, value: Any, place: _Place) -> Any:
    """A number within the bounds of its annotation."""
    kind, *annotations = get_args(hint)
    bounds = next((one for one in annotations if isinstance(one, Between)), None)
    if bounds is None or kind not in (int, float):
        return _typed(kind, value, place)
    return _within(bounds, kind, value, place)


def _within(bounds: Between, hint: Any, value: Any, place: _Place) -> Any:
    number = (_whole_number if hint is int else _number)(hint, value, place)
    if not bounds.admits(number):
        raise place.expected(f"{_described(hint)} {bounds}", value)
    return number


def _component(value: Any, place: _Place) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        raise place.expected(_described(Component), value)
    return value


def _union(hint: Any, value: Any, place: _Place) -> Any:
    members = get_args(hint)
    if value is None and types.NoneType in members:
        return None
    members = [member for member in members if member is not types.NoneType]
    errors = []
    for member in members:
        try:
            return _typed(member, value, place)
        except RecipeError as error:
            errors.append((member, error))
    # Which member was meant is clear if there is one, or one mapping for a mapping: then its error says more.
    meant = [error for member, error in errors if len(errors) == 1 or (isinstance(value, dict) and _is_mapping(member))]
    raise meant[0] if len(meant) == 1 else place.expected(_described(hint), value)


def _boolean(hint: Any, value: Any, place: _Place) -> bool:
    if not isinstance(value, bool):
        raise place.expected(_described(hint), value)
    return value


def _number(hint: Any, value: Any, place: _Place) -> float:
    if isinstance(value, str) and (_FLOAT.match(value) or re.fullmatch(r"[-+]?\d+", value)):
        value = float(value.replace("_", ""))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise place.expected(_described(hint), value)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _whole_number(hint: Any, value: Any, place: _Place) -> int:
    if isinstance(value, float) and value.is_integer():  # 1e9 tokens
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.expected(_described(hint), value)
    return value


def _text(hint: Any, value: Any, place: _Place) -> str:
    if not isinstance(value, str):
        raise place.expected(f"{_described(hint)} (put it into quotes)", value)
    return value


def _path(hint: Any, value: Any, place: _Place) -> Path:
    if not isinstance(value, str | Path):
        raise place.expected(_described(hint), value)
    return Path(value)


def _list(hint: Any, value: Any, place: _Place) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise place.expected(_described(hint), value)
    (item,) = get_args(hint) or (Any,)
    return [_typed(item, child, place.child(index)) for index, child in enumerate(value)]


def _tuple(hint: Any, value: Any, place: _Place) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise place.expected(_described(hint), value)
    items = get_args(hint) or (Any, ...)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise place.expected(f"{len(items)} values", value)
    return tuple(_typed(item, child, place.child(i)) for i, (item, child) in enumerate(zip(items, value, strict=True)))


def _dict(hint: Any, value: Any, place: _Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.expected(_described(hint), value)
    key, item = get_args(hint) or (str, Any)
    return {_typed(key, name, place): _typed(item, child, place.child(name)) for name, child in value.items()}


_CONVERTERS: dict[Any, Callable[[Any, Any, _Place], Any]] = {
    Any: lambda hint, value, place: value,
    bool: _boolean,
    int: lambda hint, value, place: _within(WHOLE, hint, value, place),
    float: lambda hint, value, place: _within(FINITE, hint, value, place),
    str: _text,
    Path: _path,
    list: _list,
    Sequence: _list,
    tuple: _tuple,
    dict: _dict,
    Mapping: _dict,
}

_NAMES = {
    Any: "a value",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}


def _described(hint: Any) -> str:
    """What a hint allows, in words."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint == Component:
        return "a mapping with `_target_`, the path of a class"
    if origin is Annotated:
        bounds = "".join(f" {one}" for one in arguments[1:] if isinstance(one, Between))
        return f"{_described(arguments[0])}{bounds}"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return f"a mapping ({hint.__name__})" if is_dataclass(hint) and isinstance(hint, type) else f"a {hint}"


def _allowed(names: Iterable[str]) -> str:
    return f" Allowed: {', '.join(sorted(names)) or 'none'}."


def _suggestion(found: Any, names: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(found), [str(name) for name in names], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
