"""Text from outside is shown, neither parsed as markup nor acted on by a terminal; all of mm prints in that way."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Group
from rich.table import Table

from mm import terminal
from mm.evaluate.report import Results
from mm.evaluate.suite import Question, Settings, Suite, write_suite
from mm.report.packs import render_packs
from mm.terminal import Console, Progress, paragraph, printable, styled
from tests.shard_files import as_json, jpeg, write_tar
from tests.small_world import environment, picture, train_here, write_recipe

HOSTILE = (
    "[/bad]",
    "[/INST]",
    "[bold]k[link=x]",
    ":smile:",
    "\x1b]0;pwned\x07",
    "\x1b[2J\x1b[31mevil",
    "a\rb",
    "\u202edexif",
    "\x9b31mevil",
    "x\nspoofed all is well",
)
"""Words that another console parses, or that move its cursor, set its title, turn its text or begin a line of it."""
ACTING = ("\x1b]0;", "\x07", "\x1b[2J", "\x1b[31mevil", "a\rb", "\u202e", "\x9b", "😄", "\nspoofed", "\n\rspoofed")


# --------------------------------------------------------------------------------------------------------- the console


def printed(*shown: object, **options: object) -> str:
    """What a console that writes colours prints."""
    written = io.StringIO()
    Console(file=written, width=200, force_terminal=True, color_system="standard").print(*shown, **options)
    return written.getvalue()


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800 lone"])
def test_a_string_is_one_line_of_words_wherever_it_is_shown(text: str) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(Group(text, styled((text, "dim"))))
    shown = printed(text, table, styled((text, "bold")), Path(text), markup=True, emoji=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert plain.count(printable(text)) == 9
    assert not any(acting in plain for acting in ACTING)
    plain.encode()


def test_words_of_other_scripts_are_shown_as_they_are() -> None:
    words = "naïve 图像\u3000说明 “ça\u00a0va” ± 🙂"
    assert printable(words) == words
    assert words in printed(words)


def test_a_long_text_is_cut() -> None:
    assert printable("x" * 10**6) == "x" * 99 + "…"


def test_a_paragraph_keeps_its_lines_and_nothing_in_it_begins_one() -> None:
    assert printed(paragraph("a: 1\n\tb\x1b[2J\n"), soft_wrap=True, end="") == "a: 1\n        b�[2J\n"
    assert printed(paragraph("no key 'x\nspoofed", indent="  "), soft_wrap=True) == "no key 'x\n  spoofed\n"


@pytest.mark.parametrize("text", [*HOSTILE, "{task.__class__}", "{0}", "{"])
def test_a_description_of_progress_is_words(text: str) -> None:
    written = io.StringIO()
    with Progress(console=Console(file=written, width=120, force_terminal=True)) as progress:
        assert list(progress.track(range(3), description=text)) == [0, 1, 2]
    assert printable(text) in written.getvalue()
    assert not any(acting in written.getvalue() for acting in ACTING if acting != "\x1b[2J")


def test_a_logged_message_cannot_act_on_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    logger = terminal.logger("mm.tests")
    for text in HOSTILE:
        logger.warning("%s: broken: %s", text, text)
    assert len(caplog.messages) == len(HOSTILE)
    assert not any(acting in message for message in caplog.messages for acting in ACTING)
    assert logging.getLogger("mm.tests") is logger


# -------------------------------------------------------------------------------------------------------- the commands

Commands = dict[str, tuple[int, list[str]]]
"""Exit status and arguments by name."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path) -> Commands:
    """Commands over hostile shards, cards, sources, suites and paths."""
    folder = tmp_path_factory.mktemp("hostile")
    write_shards(folder)
    name = "".join(HOSTILE[:6])
    run = train_here(write_recipe(folder, corpus | {name: corpus["pairs"]}, tokenizer_folder, [name], steps=1))
    words = [text.replace("\r", "\x1b[2J") for text in HOSTILE]
    asked = [Question(row, f"p{row}", text, ("a[/x]", text), 0, category=text) for row, text in enumerate(words)]
    pictures = {f"p{row}": picture(row) for row in range(len(words))}
    write_suite(Suite("suite", tuple(asked), pictures, Settings()), folder / "suite.tsv")
    pairs, chats, kept = str(folder / "pairs.yaml"), str(folder / "chats.yaml"), ["--folder", str(folder / "index")]
    return {
        "index": (0, ["index", pairs, *kept]),
        "index of chats": (0, ["index", chats, *kept]),
        "show": (0, ["data", "show", pairs, "5", *kept]),
        "drop": (0, ["data", "drop", pairs, "3", "9", *kept]),
        "check": (1, ["data", "check", pairs, "--processes", "0"]),
        "doctor": (0, ["doctor", str(folder / "pairs.tar")]),
        "plan": (0, ["plan", str(folder / "recipe.yaml")]),
        "eval": (0, ["eval", str(run), str(folder / "suite.tsv"), "--generate", "1", "--device", "cpu"]),
        "no such run": (2, ["diff", "no\x1b[2J[/x]\udcff", str(run)]),
    }


def write_shards(folder: Path) -> None:
    """Pairs and chats whose keys, roles and words are hostile, sound ones and broken ones, and their cards."""
    sound = [
        (f"{row}{key}.{kind}", data)
        for row, key in enumerate(HOSTILE)
        for kind, data in (("jpg", jpeg()), ("txt", key.encode()))
    ]
    broken = [(f"{key}.{kind}", data) for key in HOSTILE for kind, data in (("jpg", b"none"), ("txt", b"words"))]
    write_tar(folder / "pairs.tar", sound + broken)
    turns = [[("user", "Q"), ("assistant", "A")], *([(role, "Q")] for role in HOSTILE)]
    chats = [{"messages": [{"role": role, "content": words} for role, words in chat]} for chat in turns]
    (folder / "chats.jsonl").write_bytes(b"\n".join(map(as_json, chats)))
    for shard, name, more in (
        ("pairs.tar", "".join(HOSTILE), {"format": "webdataset", "sample": [{"image": "jpg"}, {"text": "txt"}]}),
        ("chats.jsonl", HOSTILE[1], {"format": "jsonl", "sample": {"chat": "messages"}}),
    ):
        card = {"name": name, "licence": "CC0", "origin": "a test", "splits": {"train": {"shards": [shard]}}, **more}
        (folder / shard).with_suffix(".yaml").write_text(yaml.safe_dump(card))


SCRIPT = """
import json, sys
from mm.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["mm", *command]
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    print("\\nexit status", status, flush=True)
"""


def check_output(output: str, commands: Commands) -> None:
    found = [int(status) for status in re.findall(r"^exit status (\d+)", output, re.MULTILINE)]
    assert dict(zip(commands, found, strict=True)) == {name: status for name, (status, _) in commands.items()}, output
    for acting in ACTING:
        before, found_there, after = output.partition(acting)
        assert not found_there, f"{acting!r} in {before[-300:]!r} {after[:80]!r}"
    assert "[/bad]" in output


def test_commands_show_hostile_data_in_a_c_locale(commands: Commands) -> None:
    arguments = json.dumps([command for _, command in commands.values()])
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        env=environment() | c_locale,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode("ascii")
    check_output(output, commands)
    assert "[/INST]" in output
    assert "\x1b" not in output


def test_commands_show_hostile_data_on_a_terminal(commands: Commands) -> None:
    some = {name: commands[name] for name in ("index", "show", "check", "doctor", "no such run")}
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps([command for _, command in some.values()])],
        env=environment() | {"TERM": "xterm-256color", "PYTHONUTF8": "1", "COLUMNS": "160"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b"".join(read_to_the_end(ours)).decode()
    started.wait()
    assert "\x1b[31m" in output, "it is a terminal: our own styles are there"
    check_output(output, some)


def read_to_the_end(descriptor: int) -> Iterator[bytes]:
    with open(descriptor, "rb", buffering=0) as stream:
        try:
            while data := stream.read(1 << 16):
                yield data
        except OSError:  # how Linux says that the other end is closed
            return


FAIL = f"""
import sys
from mm.cli import app, main
@app.command()
def fail(): raise KeyError({HOSTILE[5]!r}) from OSError({HOSTILE[4]!r} + "\\nspoofed")
sys.argv = ["mm", "fail"]
main()
"""


LIBRARY = """
import logging, sys, warnings
from mm import cli
def app():
    name = sys.argv[1]
    logging.getLogger("library").warning("\\x1b[31munexpected tensor\\x1b[0m %s", name)
    warnings.warn(f"odd field {name}")
cli.app = app
cli.main()
"""


@pytest.mark.parametrize("text", HOSTILE)
def test_what_libraries_log_and_warn_of_cannot_act_on_the_terminal(text: str) -> None:
    command = [sys.executable, "-c", LIBRARY, text.encode("utf-8", "replace").decode()]
    done = subprocess.run(command, env=environment(), capture_output=True, check=True)
    shown = done.stderr.decode()
    assert ("unexpected tensor" in shown, "odd field" in shown) == (True, True)
    assert [letter for letter in shown if not letter.isprintable() and letter not in "\n\t"] == []


def test_an_error_that_nobody_expected_is_a_traceback_without_control_characters() -> None:
    command = [sys.executable, "-c", FAIL]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pwned" in done.stderr
    assert not any(acting in done.stderr for acting in ACTING)


# ------------------------------------------------------------------------------------------------- results, pages


def test_results_with_a_text_that_utf8_cannot_hold_are_saved_and_read_back(tmp_path: Path) -> None:
    summary = {"about": {"checkpoint": "run-\udcff"}, "suite": "[/x]"}
    Results(summary, ()).save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == summary


def test_a_page_holds_a_text_that_utf8_cannot_hold() -> None:
    page = render_packs([], title="run-\udcff</title><script>", subtitle="\ud800")
    page.encode()
    assert "run-?&lt;/title&gt;&lt;script&gt;" in page


# ------------------------------------------------------------------------------------------------------------ the lint

HARMLESS = {
    "rich.console": {"Group", "RenderableType"},
    "rich.progress": {
        "BarColumn",
        "MofNCompleteColumn",
        "TaskProgressColumn",
        "TimeElapsedColumn",
        "TimeRemainingColumn",
    },
    "rich.rule": {"Rule"},
    "rich.table": {"Table"},
}
"""What has no text of its own, or whose text is made by the console that prints it."""
PRINTS = {
    "builtins": {"print"},
    "logging": {"getLogger", "basicConfig", "debug", "info", "warning", "error", "exception", "critical", "log"},
    "sys": {"stdout", "stderr", "__stdout__", "__stderr__"},
    "typer": {"echo", "secho", "style", "confirm", "prompt", "echo_via_pager", "progressbar"},
    "warnings": {"warn"},
}
PRINTERS = ("rich", "click", "tqdm", "pprint")
MARKUP = re.compile(r"\[/?(bold|dim|italic|underline|red|green|yellow|blue|link)\b[^\]]*\]|\[/\]")


def violations(source: str) -> list[str]:
    """What a module prints past `mm.terminal`, or writes as markup, which is shown as it is."""
    tree = ast.parse(source)
    found = {f"line {node.lineno}: {what}" for node in ast.walk(tree) for what in past_the_terminal(node)}
    others = {  # loggers of libraries, whose level may be set
        f"line {node.lineno}: logging.getLogger"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "logging.getLogger"
        and isinstance(node.args[0], ast.Constant)
        and not str(node.args[0].value).startswith("mm")
    }
    return sorted(found - others)


def past_the_terminal(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (each.name for each in names if each.name.partition(".")[0] in PRINTERS)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            for each in names:
                printer = module.partition(".")[0] in PRINTERS and each.name not in HARMLESS.get(module, ())
                if printer or each.name in PRINTS.get(module, ()):
                    yield f"{module}.{each.name}"
        case ast.Name(id=name) if name in PRINTS["builtins"]:
            yield name
        case ast.Attribute(value=ast.Name(id=module), attr=name) if name in PRINTS.get(module, ()):
            yield f"{module}.{name}"
        case ast.Constant(value=str(text)) if MARKUP.search(text):
            yield f"markup {text!r}"


def test_no_module_prints_past_the_terminal() -> None:
    modules = [path for path in sorted(Path("mm").rglob("*.py")) if path != Path("mm/terminal.py")]
    assert len(modules) > 100
    assert [f"{path}, {each}" for path in modules for each in violations(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "planted",
    [
        "from rich.console import Console; Console().print(key)",
        "import rich; rich.print(key)",
        "import rich.console",
        "from rich import print as show",
        "from rich.progress import Progress, BarColumn",
        "from rich.progress import track",
        "from rich.text import Text",
        "from rich.markup import escape",
        "from tqdm import tqdm",
        "print(key)",
        "print(key, file=sys.stderr)",
        "show = print",
        "sys.stderr.write(key)",
        "typer.echo(key)",
        "from typer import echo",
        "from click import secho",
        "logger = logging.getLogger(__name__)",
        "logger = logging.getLogger('mm.data')",
        "logging.warning(key)",
        "warnings.warn(key)",
        "console.print(f'[bold]{key}[/bold]')",
        "table.add_row(f'[dim]{key}[/]')",
    ],
)
def test_a_module_that_prints_past_the_terminal_is_found(planted: str) -> None:
    sound = "from rich.table import Table\nfrom mm.terminal import console\nconsole.print(key)\n"
    sound += "logging.getLogger('DeepSpeed').setLevel(logging.WARNING)\n"
    assert violations(sound) == []
    assert violations(sound + planted)
