"""Recipes: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import abc
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mm
from mm.allow import VARIABLE
from mm.configure import (
    SIZE_LIMIT,
    Component,
    RecipeError,
    build,
    dump,
    find_preset,
    load,
    parse_yaml,
    presets,
    resolve,
    to_yaml,
    typed,
)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "muon"] = "adamw"
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; expected more than 0")


@dataclass(frozen=True)
class Branch:
    encoder: Component
    freeze: bool = True
    tokens: int | None = None


@dataclass(frozen=True)
class Stage:
    until: int
    optim: Optim | None = None


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: int = 10
    optim: Optim = field(default_factory=Optim)
    encoders: dict[str, Branch] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    where: str | None = None
    cache: Path = Path("cache")
    limit: float | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Inner:
    folder: str = "${name}/inner"


@dataclass(frozen=True)
class Defaults:
    name: str
    run: str = "runs/${name}"
    inner: Inner = field(default_factory=Inner)
    parts: dict[str, Inner] = field(default_factory=dict)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of a user with a preset and a recipe that names it."""
    monkeypatch.chdir(tmp_path)
    write(
        "encoders/small.yaml",
        "# A small tower\nencoder: {_target_: towers.Small, width: 64, depth: 2}\nfreeze: false\n",
    )
    write("encoders/large.yaml", "# A large tower\nencoder: {_target_: towers.Large, heads: 16}\ntokens: 729\n")
    write("train/first.yaml", "name: first\noptim:\n  lr: 3e-4\nencoders:\n  image: encoders/small.yaml\n")
    return tmp_path


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def recipe(text: str, *overrides: str) -> Recipe:
    return load(Recipe, write("recipe.yaml", text), overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(text, *overrides)
    return str(caught.value)


# Values and types


def test_defaults_stand_where_the_recipe_says_nothing(folder: Path) -> None:
    assert recipe("name: a") == Recipe(name="a")


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", ".0001"])
def test_a_learning_rate_is_a_number_however_it_is_written(folder: Path, written: str) -> None:
    assert recipe(f"name: a\noptim: {{lr: {written}}}").optim.lr == 1e-4


def test_whole_numbers_may_be_written_with_an_exponent(folder: Path) -> None:
    assert recipe("name: a\nsteps: 1e6").steps == 1_000_000
    assert "expected a whole number" in refusal("name: a\nsteps: 1.5")


@pytest.mark.parametrize("word", ["no", "on", "12:30", "2024-01-01", "010", "1e"])
def test_words_that_yaml_1_1_would_convert_stay_words(folder: Path, word: str) -> None:
    assert recipe(f"name: {word}").name == word


def test_every_kind_of_field_is_typed(folder: Path) -> None:
    loaded = recipe(
        "{name: a, optim: {betas: [0, 0.5], kind: muon, fused: true}, stages: [{until: 5}, {until: 9, optim: {lr: 2}}],"
        " cache: some/where, limit: 3, where: null}"
    )
    assert loaded.optim.betas == (0.0, 0.5)
    assert isinstance(loaded.optim.betas[0], float)
    assert loaded.stages == [Stage(5), Stage(9, Optim(lr=2.0))]
    assert loaded.cache == Path("some/where")
    assert loaded.limit == 3.0
    assert recipe("{name: a, limit: auto}").limit == "auto"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: a\noptim:\n  lrr: 1",
            ["recipe.yaml:3", "`optim.lrr`", "unknown key", "betas, fused, kind, lr", "'lr'"],
        ),
        ("name: a\noptim:\n  lr: fast", ["recipe.yaml:3", "`optim.lr`", "'fast'", "a number"]),
        ("name: a\noptim:\n  lr: true", ["`optim.lr` is True", "a number"]),
        ("name: a\noptim:\n  kind: adam", ["`optim.kind`", "one of 'adamw', 'muon'", "Did you mean 'adamw'"]),
        ("name: a\noptim:\n  fused: 1", ["`optim.fused` is 1", "true or false"]),
        ("name: a\noptim:\n  betas: [1]", ["`optim.betas`", "2 values"]),
        ("name: a\noptim:\n  betas: [1, x]", ["`optim.betas.1` is 'x'"]),
        ("name: 3", ["`name` is 3", "text (put it into quotes)"]),
        ("steps: 3", ["recipe.yaml:1", "`name` is missing", "text"]),
        ("name: ???", ["`name` has no value yet"]),
        ("name: a\nstages: [{until: 1}, {}]", ["`stages.1.until` is missing"]),
        ("name: a\nencoders: {image: {encoder: {width: 3}}}", ["`encoders.image.encoder`", "_target_"]),
        ("name: a\nlimit: sometimes", ["`limit` is 'sometimes'", "a number or one of 'auto'"]),
        ("name: a\noptim:\n  lr: -1", ["recipe.yaml:2", "`optim`", "expected more than 0"]),
        ("name: a\nname: b", ["recipe.yaml:2", "`name` stands twice", "line 1"]),
        ("name: [", ["recipe.yaml", "YAML"]),
        ("[1, 2]", ["a recipe is a mapping"]),
        ("1: a", ["key 1 is not text"]),
        ("a: &x [1]\nb: [*x, *x]", ["aliases", "${key}"]),
        ("name: !!python/object/apply:os.system ['true']", ["recipe.yaml:1", "YAML tags"]),
        ("name: !!binary aGk=", ["YAML tags"]),
    ],
)
def test_a_mistake_is_named_with_its_key_its_line_and_what_is_allowed(folder: Path, text: str, said: list[str]) -> None:
    message = refusal(text)
    assert [words for words in said if words not in message] == [], message


def test_huge_and_binary_files_are_refused(folder: Path) -> None:
    assert str(SIZE_LIMIT) in refusal("name: a\n" + "#" * SIZE_LIMIT)
    Path("recipe.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        load(Recipe, "recipe.yaml")


# Interpolation


def test_a_value_may_refer_to_another(folder: Path) -> None:
    loaded = recipe("name: run-${steps}\nsteps: 7\nstages: [{until: '${steps}'}]\ncache: runs/${name}")
    assert (loaded.name, loaded.stages[0].until, loaded.cache) == ("run-7", 7, Path("runs/run-7"))


def test_a_reference_to_nothing_names_the_key_and_the_line(folder: Path) -> None:
    assert "recipe.yaml:2: `optim.lr`" in refusal("name: a\noptim: {lr: '${nothing}'}")


# Presets


def test_a_path_where_a_mapping_is_expected_names_a_preset(folder: Path) -> None:
    loaded = load(Recipe, "train/first.yaml")
    assert loaded.encoders["image"] == Branch({"_target_": "towers.Small", "width": 64, "depth": 2}, freeze=False)


def test_a_path_where_text_is_expected_stays_a_path(folder: Path) -> None:
    assert recipe("name: encoders/small.yaml").name == "encoders/small.yaml"


def test_a_preset_beside_the_recipe_comes_before_the_working_directory(folder: Path) -> None:
    write("mine/encoders/small.yaml", "encoder: {_target_: towers.Mine}")
    write("mine/recipe.yaml", "name: a\nencoders: {image: encoders/small.yaml}")
    assert load(Recipe, "mine/recipe.yaml").encoders["image"].encoder == {"_target_": "towers.Mine"}


def test_keys_beside_a_preset_override_it(folder: Path) -> None:
    loaded = recipe("name: a\nencoders: {image: {preset: encoders/small.yaml, tokens: 4, encoder: {depth: 3}}}")
    assert loaded.encoders["image"] == Branch({"_target_": "towers.Small", "width": 64, "depth": 3}, False, 4)


def test_another_class_drops_the_options_of_the_former(folder: Path) -> None:
    loaded = recipe("name: a\nencoders: {image: {preset: encoders/small.yaml, encoder: {_target_: towers.Other}}}")
    assert loaded.encoders["image"].encoder == {"_target_": "towers.Other"}


def test_a_recipe_may_build_on_a_recipe(folder: Path) -> None:
    loaded = recipe("preset: train/first.yaml\nname: second\noptim: {fused: true}")
    assert (loaded.name, loaded.optim, set(loaded.encoders)) == ("second", Optim(lr=3e-4, fused=True), {"image"})


def test_items_of_a_list_may_be_presets(folder: Path) -> None:
    write("train/stage.yaml", "until: 3\noptim: train/optim.yaml")
    write("train/optim.yaml", "lr: 0.5")
    assert recipe("name: a\nstages: [train/stage.yaml, {until: 4}]").stages == [Stage(3, Optim(lr=0.5)), Stage(4)]


def test_an_error_inside_a_preset_names_the_preset(folder: Path) -> None:
    write("encoders/bad.yaml", "encoder: {_target_: a.B}\nfreez: true")
    assert "encoders/bad.yaml:2: `encoders.image.freez`" in refusal("name: a\nencoders: {image: encoders/bad.yaml}")


def test_a_missing_preset_names_the_line_and_the_nearest(folder: Path) -> None:
    message = refusal("name: a\nencoders:\n  image: encoders/smal.yaml")
    assert "recipe.yaml:3" in message
    assert "Did you mean 'encoders/small.yaml'?" in message


def test_presets_that_include_each_other_are_refused(folder: Path) -> None:
    write("recipe.yaml", "preset: other.yaml")
    write("other.yaml", "preset: recipe.yaml")
    with pytest.raises(RecipeError, match=r"includes itself: .*recipe\.yaml → .*other\.yaml → .*recipe\.yaml"):
        load(Recipe, "recipe.yaml")


def test_presets_are_listed_with_their_first_comment_line(folder: Path) -> None:
    listed = {preset.path: preset for preset in presets()["encoders"]}
    assert listed["encoders/small.yaml"].description == "A small tower"
    assert find_preset("encoders/small.yaml") == folder / "encoders/small.yaml" == listed["encoders/small.yaml"].file


def test_presets_are_listed_among_other_files_of_the_working_directory(folder: Path) -> None:
    (folder / "encoders/latin.yaml").write_bytes(b"# caf\xe9\n")
    (folder / "encoders/folder.yaml").mkdir()
    (folder / "encoders/lost.yaml").symlink_to("nowhere")
    os.mkfifo(folder / "encoders/pipe.yaml")
    listed = {preset.path: preset.description for preset in presets()["encoders"]}
    assert listed["encoders/small.yaml"] == "A small tower"
    assert listed["encoders/latin.yaml"] == "caf\ufffd"
    assert {"encoders/folder.yaml", "encoders/lost.yaml", "encoders/pipe.yaml"}.isdisjoint(listed)


# Overrides


def test_overrides_reach_every_depth(folder: Path) -> None:
    loaded = load(Recipe, "train/first.yaml", ["optim.lr=1e-5", "encoders.image.encoder.width=8", "name=b=c", "where="])
    assert (loaded.optim.lr, loaded.name, loaded.where) == (1e-5, "b=c", None)
    assert loaded.encoders["image"].encoder == {"_target_": "towers.Small", "width": 8, "depth": 2}


def test_an_override_may_name_a_preset(folder: Path) -> None:
    loaded = load(Recipe, "train/first.yaml", ["encoders.image=encoders/large.yaml", "encoders.image.tokens=196"])
    assert loaded.encoders["image"] == Branch({"_target_": "towers.Large", "heads": 16}, True, 196)


def test_an_override_reaches_into_a_list(folder: Path) -> None:
    loaded = recipe("name: a\nstages: [{until: 1}, {until: 2}]", "stages.1.until=5")
    assert loaded.stages == [Stage(1), Stage(5)]
    assert "expected 0 to 0" in refusal("name: a\nstages: [{until: 1}]", "stages.1.until=5")


def test_a_wrong_override_is_blamed_on_the_command_line(folder: Path) -> None:
    assert "command line: `optim.lrr`" in refusal("name: a", "optim.lrr=3")
    assert "key=value" in refusal("name: a", "optim.lr")
    # … and what the file lacks on the file
    assert "recipe.yaml:1: `name` is missing" in refusal("steps: 1", "optim.lr=3")


def test_defaults_may_refer_to_other_values_too(folder: Path) -> None:
    loaded = load(Defaults, write("recipe.yaml", "name: first\nparts: {a: {}, b: {folder: here}}"))
    assert loaded.run == "runs/first"
    assert loaded.inner.folder == "first/inner"
    assert {name: part.folder for name, part in loaded.parts.items()} == {"a": "first/inner", "b": "here"}


# Round trip

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["1e-4", "no", "null", "~", "${name}", "\\${a}", "\\\\${b}", "a\\", "1:30", "???x", "2024-01-01", "0x1F", "- a"]
)
numbers = st.floats(min_value=1e-300, allow_infinity=False)
options = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words.filter(lambda key: key != "preset"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(name=words, lr=numbers, values=options, where=st.none() | words)
def test_a_dumped_recipe_loads_back_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, values: Any, where: str | None
) -> None:
    branch = Branch({"_target_": "a.B", "values": values}, tokens=3)
    saved = Recipe(name, 3, Optim(lr), {"image": branch}, [Stage(1), Stage(2, Optim())], where, Path("a b"), limit=lr)
    file = tmp_path_factory.mktemp("round") / "recipe.yaml"
    file.write_text(to_yaml(saved), encoding="utf-8")
    assert load(Recipe, file) == saved
    assert typed(Recipe, dump(saved)) == saved


def test_a_dumped_recipe_reads_the_same_with_any_yaml_reader(folder: Path) -> None:
    saved = Recipe("1e-4", where="no", optim=Optim(lr=1e-5))
    assert yaml.safe_load(to_yaml(saved)) == dump(saved)


def test_resolve_expands_presets_without_typing(folder: Path) -> None:
    assert resolve("train/first.yaml", ["steps=5"], Recipe)["encoders"]["image"]["encoder"]["width"] == 64
    assert resolve("train/first.yaml")["encoders"]["image"] == "encoders/small.yaml"


# Components


class Tower(abc.ABC):
    @abc.abstractmethod
    def forward(self) -> int: ...


class Small(Tower):
    def __init__(self, features: int, width: int, *, scale: float = 1.0, pair: tuple[int, int] = (1, 1)) -> None:
        self.arguments = (features, width, scale, pair)

    @classmethod
    def tiny(cls, scale: float = 0.5) -> Small:
        return cls(1, 2, scale=scale)

    @classmethod
    def wrong(cls) -> int:
        return 3

    def forward(self) -> int:
        return 0


class Unfinished(Tower):
    pass


def a_function() -> Small:
    raise AssertionError("never called")


HERE = __name__


@pytest.fixture(autouse=True)
def components_of_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{HERE},my_tower,my_broken_tower")


def test_a_component_is_built_from_its_class_path() -> None:
    tower = build({"_target_": f"{HERE}.Small", "width": 8, "scale": "1e-2", "pair": [3, 4]}, Tower, 5)
    assert isinstance(tower, Small)
    assert tower.arguments == (5, 8, 0.01, (3, 4))
    assert build({"_target_": f"{HERE}.Small"}, Small, 5, width=6).arguments == (5, 6, 1.0, (1, 1))


def test_a_class_method_may_build_the_component() -> None:
    assert build({"_target_": f"{HERE}.Small.tiny", "scale": 2}, Small).arguments == (1, 2, 2.0, (1, 1))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"width": 3}, ["_target_", "Tower"]),
        ({"_target_": "os.system", "command": "true"}, ["not a", "Tower"]),
        ({"_target_": "builtins.eval"}, ["not a"]),
        ({"_target_": f"{HERE}.a_function"}, ["not a", "subclass"]),
        ({"_target_": f"{HERE}.Small.forward"}, ["not a"]),
        ({"_target_": f"{HERE}.Small.wrong"}, ["gave a int"]),
        ({"_target_": f"{HERE}.Unfinished"}, ["does not define forward"]),
        ({"_target_": f"{HERE}.Smal"}, ["has no 'Smal'", "Small", "Did you mean 'Small'"]),
        ({"_target_": "nowhere_at_all.Small"}, ["no such module", "working directory"]),
        ({"_target_": "Small"}, ["no such module"]),
        ({"_target_": ".Small"}, ["package.module.Class"]),
        ({"_target_": f"{HERE}.Small", "width": 3, "widht": 3}, ["`widht`", "pair, scale, width", "'width'"]),
        ({"_target_": f"{HERE}.Small"}, ["missing option `width`"]),
        ({"_target_": f"{HERE}.Small", "width": "wide"}, [f"`{HERE}.Small.width` is 'wide'", "a whole number"]),
        ({"_target_": f"{HERE}.Small", "width": 3, "features": 3}, ["`features` is set by the suite"]),
    ],
)
def test_a_component_that_cannot_be_built_says_why(spec: dict[str, Any], said: list[str]) -> None:
    arguments = (5,) if "Small" in str(spec) and "wrong" not in str(spec) else ()
    with pytest.raises(RecipeError) as caught:
        build(spec, Tower, *arguments)
    assert [words for words in said if words not in str(caught.value)] == []


def test_a_users_own_module_is_a_component(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    write("my_tower.py", f"from {HERE} import Small\nclass Mine(Small): pass\n")
    write("my_broken_tower.py", "import a_library_that_is_not_installed\n")
    assert type(build({"_target_": "my_tower.Mine", "width": 1}, Tower, 1)).__name__ == "Mine"
    with pytest.raises(RecipeError, match="importing my_broken_tower failed: No module named 'a_library"):
        build({"_target_": "my_broken_tower.Mine"}, Tower)
    assert "a_library_that_is_not_installed" not in sys.modules


# Command line

ROOT = Path(mm.__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", ["mm/__main__.py", "mm/cli.py", "mm"])
def test_running_a_file_of_the_package_stops_with_a_sentence(file: str) -> None:
    done = run(str(ROOT / file))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "python -m mm" in done.stderr


def test_presets_are_listed_shown_and_copied(folder: Path) -> None:
    assert "A small tower" in run("-m", "mm", "preset", "ls", "encoders").stdout
    assert run("-m", "mm", "preset", "show", "encoders/small.yaml").stdout == Path("encoders/small.yaml").read_text()
    assert run("-m", "mm", "preset", "copy", "encoders/small.yaml", "mine/own.yaml").returncode == 0
    assert Path("mine/own.yaml").read_text() == Path("encoders/small.yaml").read_text()


def test_a_mistake_on_the_command_line_is_a_sentence_not_a_traceback(folder: Path) -> None:
    for command in (["copy", "encoders/small.yaml"], ["show", "encoders/smal.yaml"], ["ls", "encoder"]):
        done = run("-m", "mm", "preset", *command)
        assert done.returncode == 2
        assert done.stderr.startswith("RecipeError")
        assert "Traceback" not in done.stderr


def test_a_module_in_the_working_directory_hides_no_library(folder: Path) -> None:
    write("wave.py", "raise AssertionError('a file of the user was imported in place of a library')")
    write("my_tower.py", "import wave\n")
    code = (
        "import sys; sys.path.remove(''); from mm.allow import import_allowed\n"
        "print(import_allowed('my_tower').__file__)"
    )
    done = run("-c", code)
    assert done.stdout.strip().endswith(str(folder / "my_tower.py")), done.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 900 + "b, " * 300_000, "nested too deep, in line 1"),
        ("".join(f"{' ' * level}a:\n" for level in range(100)), "nested too deep, in line 64"),
        (f"a: [{'b, ' * 100_000}]", "more than 100,000 values"),
    ],
)
def test_yaml_that_would_take_minutes_to_read_is_refused_by_its_depth_or_number_of_values(
    text: str, reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_yaml(text)
