"""What builders make of odd files and records: each is read, or counted with its reason, and none ends a build."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.data.card import Card
from mm.data.hidden import is_hidden
from mm.data.index import Index, index_card
from mm.data.sources import build
from mm.data.sources.folder import LEADS_OUT
from mm.data.sources.openclipart import read_captions
from mm.data.sources.records import read_records
from mm.data.sources.writer import BuildError, Report
from mm.sample import Image
from tests.shard_files import jpeg, words


def index(out: Path, split: str = "train") -> Index:
    return index_card(Card.load(out / "card.yaml"), split, out / "index", progress=False)


def captions(out: Path) -> dict[str, str]:
    """The caption of every sample of a folder of pictures, by key."""
    rows = index(out)
    assert not len(rows.errors)
    return {sample.key: words(sample)[0] for sample in map(rows.sample, range(rows.rows))}


def photos(source: Path, *names: str) -> Path:
    """Pictures, and words for those whose name ends in ``+``: their own path."""
    for name in names:
        file = source / name.removesuffix("+")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg())
        if name.endswith("+"):
            file.with_suffix(".txt").write_text(name.removesuffix("+"))
    return source


def build_photos(source: Path, **options: Any) -> Report:
    return build("image-folder", source.parent / "out", source=source, validation=0.0, **options)


def chat(question: Any = "What is it?", answer: Any = "A dog.", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def build_chats(folder: Path, data: bytes | list[Any], name: str = "chats.json", **options: Any) -> Report:
    """Builds records with the pictures of ``images``, where 0.jpg is if nothing else is."""
    if not (folder / "images").exists():
        photos(folder / "images", "0.jpg")
    (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return build(
        "llava-json",
        folder / "out",
        source=folder / name,
        images=folder / "images",
        **({"validation": 0.0} | options),
    )


# ---------------------------------------------------------------------------------------------------- image folders


def test_pictures_are_read_whatever_the_case_and_dialect_of_their_extension(tmp_path: Path) -> None:
    names = ("a.JPG", "b.jfif", "c.JPE", "d.Jpeg", "e.pjpeg", "f.jif")
    report = build_photos(photos(tmp_path / "in", *(f"{name}+" for name in names)))
    assert captions(tmp_path / "out") == {name[0]: name for name in names}
    assert not report.skipped


def test_files_of_other_types_are_counted_by_type(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "a.jpg+", "b.heic+", "c.HEIC+", "d.avif+", "e.svg")
    (source / "README").write_text("about")
    report = build_photos(source)
    assert report.skipped == {
        "type not read: .heic": 2,
        "type not read: .avif": 1,
        "type not read: .svg": 1,
        "type not read: no known extension": 1,
        "words that belong to no picture, or to one that has others": 3,
    }
    assert report.skips.examples["type not read: .heic"] == "b.heic"
    assert "2 × type not read: .heic, such as b.heic" in report.skips.lines()


def test_words_are_found_by_any_case_and_by_the_full_name_of_the_picture(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "a.jpg", "b.jpg", "c.JPG", "d.jpg", "e.jpg")
    for name in ("a.TXT", "b.jpg.txt", "c.jpg.Txt", "d.txt", "d.TXT", "d.jpg.txt", "f.txt"):
        (source / name).write_text(name)
    (source / "e.jpg.JSON").write_text('{"caption": "e"}')
    report = build_photos(source)
    assert captions(tmp_path / "out") == {"a": "a.TXT", "b": "b.jpg.txt", "c": "c.jpg.Txt", "d": "d.txt", "e": "e"}
    assert report.skipped == {"words that belong to no picture, or to one that has others": 3}


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path: Path) -> None:
    hidden = (".ipynb_checkpoints/0-checkpoint.jpg+", "@eaDir/0.jpg+", "__MACOSX/deep/0.jpg+", "in/.0.jpg+")
    report = build_photos(photos(tmp_path / "in", "0.jpg+", *hidden))
    assert captions(tmp_path / "out") == {"0": "0.jpg"}
    assert report.skipped["a hidden file or folder"] == 5  # three folders, a picture, its words


@pytest.mark.parametrize(
    ("path", "hidden"),
    [("a/.b/c", True), ("@eaDir/x", True), ("x/Thumbs.db", True), ("./a/../b", False), ("a.b/c.d", False)],
)
def test_what_is_hidden(path: str, hidden: bool) -> None:
    assert is_hidden(path) is hidden


def test_of_pictures_of_one_name_the_first_that_can_be_read_is_used(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "a.jpg+", "a.png", "b.jpg+", "b.webp", "c-d.jpg+", "c/d.jpg+")
    (source / "b.jpg").write_bytes(b"no picture")
    (source / "a.txt").write_text("a")
    report = build_photos(source)
    assert list(captions(tmp_path / "out")) == ["a", "b", "c-d"]
    assert report.skipped == {
        "another picture gives a sample of this name; rename one": 2,
        "unreadable picture": 1,
    }


def test_links_out_of_the_folder_are_counted_and_read_only_if_the_user_says_so(tmp_path: Path) -> None:
    source, other = photos(tmp_path / "in", "0.jpg+", "1.jpg"), photos(tmp_path / "other", "9.jpg+")
    (source / "more").symlink_to(other)
    (source / "8.jpg").symlink_to(other / "9.jpg")
    (source / "8.txt").write_text("eight")
    (source / "1.txt").symlink_to("/etc/passwd")
    report = build_photos(source)
    assert captions(tmp_path / "out") == {"0": "0.jpg"}
    assert report.skipped == {LEADS_OUT: 3, "no .txt and no .json next to the picture": 1}
    report = build_photos(source, follow_links="true")
    assert set(captions(tmp_path / "out")) == {"0", "1", "8", "more-9"}
    assert not report.skipped


def test_links_inside_the_folder_are_followed_and_loops_end(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "a/0.jpg+", "b/c/1.jpg+")
    (source / "again").symlink_to(source / "a")
    (source / "copy.jpg").symlink_to("a/0.jpg")
    (source / "copy.txt").write_text("copy")
    (source / "once more").symlink_to(source / "a")
    (source / "b" / "c" / "loop").symlink_to(source)
    (source / "self").symlink_to("self")
    (source / "nothing").symlink_to("nowhere")
    report = build_photos(source)
    assert set(captions(tmp_path / "out")) == {"a-0", "again-0", "b-c-1", "copy"}
    assert report.skipped == {"a link to a folder that is read already": 2, "the file is not there": 2}


@pytest.mark.timeout(20)
def test_pipes_devices_and_huge_files_are_never_opened(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "0.jpg+", "1.jpg")
    os.mkfifo(source / "pipe.jpg")
    os.mkfifo(source / "1.txt")
    (source / "zero.jpg").symlink_to("/dev/zero")
    with (source / "large.jpg").open("wb") as file:
        file.truncate(1024**3 + 1)
    for name in ("pipe", "zero", "large"):
        (source / f"{name}.txt").write_text(name)
    (source / "folder.jpg").mkdir()
    report = build_photos(source, follow_links=True)
    assert captions(tmp_path / "out") == {"0": "0.jpg"}
    assert report.skipped == {
        "not a plain file": 3,
        "file too large": 1,
        "no .txt and no .json next to the picture": 1,
    }


def test_names_that_are_no_text_and_words_that_give_no_caption(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "0.jpg+", "1.jpg", "2.jpg", "3.jpg")
    name = os.fsencode(source) + b"/caf\xe9"
    Path(os.fsdecode(name + b".jpg")).write_bytes(jpeg())
    Path(os.fsdecode(name + b".txt")).write_text("coffee")
    (source / "1.txt").write_text("  \n")
    (source / "2.txt").write_bytes(b"caf\xe9")
    (source / "3.json").write_text("{")
    report = build_photos(source)
    assert captions(tmp_path / "out") == {"0": "0.jpg", "caf\\udce9": "coffee"}
    assert report.skipped == {"empty text": 1, "text is not UTF-8": 1, "broken JSON": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_the_user_may_not_read_is_counted(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "0.jpg+", "1.jpg+", "secret/2.jpg+")
    (source / "1.jpg").chmod(0)
    (source / "secret").chmod(0)
    assert build_photos(source).skipped == {"no permission to read": 2}
    (source / "secret").chmod(0o700)


# -------------------------------------------------------------------------------------------------------- JSON files


def test_a_mark_and_characters_that_look_like_line_ends_are_no_faults(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\u0085d\x0be"
    lines = "\r\n".join(json.dumps(chat(odd, str(number)), ensure_ascii=False) for number in range(3))
    for name, text in (("a.jsonl", lines), ("b.json", json.dumps([chat(odd)] * 3, ensure_ascii=False))):
        build_chats(tmp_path, b"\xef\xbb\xbf" + text.encode(), name)
        rows = index(tmp_path / "out")
        assert [words(rows.sample(row))[0] for row in range(rows.rows)] == [odd] * 3


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "chats"])
def test_the_content_says_whether_a_file_is_a_list_or_lines(tmp_path: Path, name: str) -> None:
    lines = b"\n\n" + b"\n".join(json.dumps(chat()).encode() for _ in range(3))
    assert build_chats(tmp_path, lines, name).samples["train"] == 3
    assert build_chats(tmp_path, [chat()] * 2, name).samples["train"] == 2
    assert build_chats(tmp_path, b"[1]" + lines, name).skipped == {"broken record": 1}
    assert build_chats(tmp_path, json.dumps([chat()] * 4, indent=2).encode(), name).samples["train"] == 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[{"a": 1},\n {"b": }]', r"line 2, column 8: no JSON: Expecting value"),
        (b'[{"a": 1} {"b": 2}]', r"line 1, column 11: no JSON: Expecting ',' or '\]'"),
        (b'[{"a": 1}', r"line 1, column 10: no JSON"),
        (b"[{}] [{}]", r"line 1, column 6: no JSON: More follows"),
        (b"[{}]\n[{}]", r"2 × broken record, such as line 1"),
        (b"[" * 100_000, r"line 1, column 100001: no JSON: The file ends inside of a record"),
        (b'[{"a": ' + b"[" * 100_000 + b'"\\"' * 100_000, r"The file ends inside of a record"),
        (b'{\n "data": [],\n "version": 2\n}', r"is one object \(keys 'data', 'version'\)"),
        (b"id,image\n1,a.jpg\n", r"none of 2 records could be used.*line 1: .*line 1 column 1"),
        (b"\xff\xfe\x80", "text is not UTF-8|truncated"),
        ("[]".encode("utf-16"), "is UTF-16, expected UTF-8"),
        (b"[]", "none of 0 records"),
        (b"", "none of 0 records"),
        (b"[1, null, [], true]", "4 × broken record, such as record 1"),
        (b"\x1f\x8b\x08", "is compressed"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_with_a_sentence(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        build_chats(tmp_path, data)
    assert type(refused.value).__module__.startswith("mm.")
    assert str(tmp_path / "chats.json") in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(20)
def test_a_folder_a_pipe_or_a_device_is_no_file_of_records(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for source in (tmp_path, tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(BuildError, match="not a plain file"):
            list(read_records(source))
    with pytest.raises(FileNotFoundError, match="no file at"):
        list(read_records(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------------------- odd records

DEEP = "[" * 100_000 + "]" * 100_000
ODD = {
    "number for a picture": json.dumps(chat("<image>", image=5)),
    "bool": json.dumps(chat("<image>", image=True)),
    "false": json.dumps(chat(image=False)),
    "mapping": json.dumps(chat("<image>", image={"path": "0.jpg"})),
    "null in a list": json.dumps(chat("<image>", image=[None])),
    "list in a list": json.dumps(chat("<image>", image=[["0.jpg"]])),
    "zero byte": json.dumps(chat("<image>", image="\0")),
    "300 letters": json.dumps(chat("<image>", image="x" * 300)),
    "5000 letters": json.dumps(chat("<image>", image="x/" * 5000)),
    "half a pair in a name": json.dumps(chat("<image>", image="\ud800")),
    "half a pair in a turn": json.dumps(chat("a\ud800")),
    "half a pair in a key": json.dumps({**chat(), "\ud800": 1}),
    "the folder itself": json.dumps(chat("<image>", image=".")),
    "an address": json.dumps(chat("<image>", image="https://example.org/0.jpg")),
    "out of the folder": json.dumps(chat("<image>", image="../secret.jpg")),
    "absolute": json.dumps(chat("<image>", image="/etc/passwd")),
    "below a file": json.dumps(chat("<image>", image="0.jpg/1.jpg")),
    "too many": json.dumps(chat("<image>" * 17, image=["0.jpg"] * 17)),
    "pictures under another key": json.dumps(chat("What?", images=["0.jpg"])),
    "a video": json.dumps(chat("<video>\nWhat?", video="0.mp4")),
    "no list of turns": json.dumps({"conversations": {"from": "human"}}),
    "turns that are texts": json.dumps({"conversations": ["a", "b"]}),
    "null for words": json.dumps(chat(None)),
    "number for words": json.dumps(chat(3)),
    "mapping for words": json.dumps(chat({"a": 1})),
    "unknown speaker": json.dumps({"conversations": [{"from": ["x"], "value": "a"}]}),
    "empty": "{}",
    "nested in the record": json.dumps(chat(more=0)).replace(": 0}", f": {DEEP}}}"),
    "nested less": json.dumps(chat(more=0)).replace(": 0}", f": {'[' * 500 + ']' * 500}}}"),
    "many digits": json.dumps(chat(more=0)).replace(": 0}", f": {'9' * 5000}}}"),
    "digits only": "9" * 5000,
    "nested only": DEEP,
}


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_record_is_counted_and_costs_no_other(tmp_path: Path, odd: str, form: str) -> None:
    good = json.dumps(chat("<image>\nWhat?", image="0.jpg"))
    records = [good, odd, good]
    data = "[" + ",\n".join(records) + "]" if form == "list" else "\n".join(records)
    report = build_chats(tmp_path, data.encode())
    assert report.samples["train"] == 2
    assert report.skipped.total() == 1
    rows = index(tmp_path / "out")
    assert (rows.rows, len(rows.errors)) == (2, 0)
    assert rows.sample(1).media == (Image(jpeg(), "user"),)


def test_bytes_that_are_not_utf_8_cost_their_record_only(tmp_path: Path) -> None:
    records = [json.dumps(chat()), json.dumps(chat("caf#")), json.dumps(chat())]
    data = ("[" + ", ".join(records) + "]").encode().replace(b"#", b"\xe9")
    report = build_chats(tmp_path, data)
    assert (report.samples["train"], dict(report.skipped)) == (2, {"text is not UTF-8": 1})


def test_a_build_of_odd_records_alone_leaves_the_earlier_one(tmp_path: Path) -> None:
    build_chats(tmp_path, [chat()] * 6, samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(BuildError, match="none of 1 records"):
        build_chats(tmp_path, [chat("<image>", image=5)])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert build_chats(tmp_path, [chat(), {}, chat()], samples_per_shard=2).samples["train"] == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"card.yaml", "train-0000.tar"}


def test_one_rule_for_links_holds_for_records_too(tmp_path: Path) -> None:
    images, other = photos(tmp_path / "images", "0.jpg"), photos(tmp_path / "coco", "1.jpg")
    (images / "coco").symlink_to(other)
    (images / "inside").symlink_to(images)
    (images / "self").symlink_to("self")
    paths = ["inside/0.jpg", f"{images}/0.jpg", "inside/../0.jpg", "coco/1.jpg", "coco/../0.jpg"]
    never = ["../coco/1.jpg", f"{other}/1.jpg", "coco/../../coco/1.jpg", "self/1.jpg"]
    records = [chat("<image>", image=path) for path in paths + never]
    report = build_chats(tmp_path, records)
    assert report.samples["train"] == 4
    outside = {"the path of a picture leads out of the folder": 3, "the file is not there": 1}
    assert report.skipped == {LEADS_OUT: 1} | outside
    assert report.skips.examples[LEADS_OUT] == "record 4: coco/1.jpg"
    report = build_chats(tmp_path, records, follow_links=True)
    assert report.samples["train"] == 5
    assert report.skipped == outside


TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "x", None, 1])},
    optional={"value": st.sampled_from(["a", "", "<image>", "b\ud800", None, 1, ["a"], {"type": "text"}])},
)
RECORD = st.one_of(
    st.just(chat("<image>", image="0.jpg")),
    st.fixed_dictionaries(
        {"conversations": st.one_of(st.lists(st.one_of(TURN, st.just("a")), max_size=3), st.none(), st.just("x"))},
        optional={"image": st.sampled_from(["0.jpg", "", "..", None, 0, ["0.jpg"] * 2, [None], {}, "\ud800"])},
    ),
    st.recursive(st.none() | st.booleans() | st.text(max_size=3), st.lists, max_leaves=3),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORD, max_size=6), lines=st.booleans())
def test_whatever_is_built_is_read_by_the_card_and_the_rest_is_counted(
    tmp_path: Path, records: list[Any], lines: bool
) -> None:
    records = [*records, chat()]
    data = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    report = build_chats(tmp_path, data.encode())
    rows = index(tmp_path / "out")
    assert (rows.rows, len(rows.errors)) == (report.samples["train"], 0)
    assert report.samples["train"] + report.skipped.total() == len(records)


# ---------------------------------------------------------------------------------------------------- other builders


def test_mmc4_documents_may_be_odd_too(tmp_path: Path) -> None:
    photos(tmp_path / "images", "0.jpg")
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    (tmp_path / "images" / "out.jpg").symlink_to("/etc/passwd")
    (tmp_path / "docs").mkdir()
    good = {"text_list": ["a", "b\u2028"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 0}]}
    odd = [
        *({**good, "image_info": [{"image_name": name}]} for name in ("pipe.jpg", "out.jpg", "\ud800", "", 5, None)),
        {**good, "url": "\ud800"},
        {**good, "text_list": "a"},
        [good],
    ]
    text = "\n".join(json.dumps(one, ensure_ascii=one is not good) for one in [good, *odd, good])
    (tmp_path / "docs" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "docs" / "b.jsonl").write_text(json.dumps([good] * 2))
    (tmp_path / "docs" / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    report = build("mmc4", tmp_path / "out", source=tmp_path / "docs", images=tmp_path / "images", validation=0.0)
    rows = index(tmp_path / "out")
    assert (report.samples["train"], rows.rows, len(rows.errors)) == (4, 4, 0)
    assert report.skipped.total() == len(odd) + 1
    assert report.skipped[LEADS_OUT] == report.skipped["a hidden file or folder"] == 1


@pytest.mark.parametrize("data", [b"", b"file\tcaption\xe9", b"file\tcaption\thead\tcategory\n" + b"x" * 200_000])
def test_a_table_that_is_none_is_refused_with_a_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "captions.tsv").write_bytes(data)
    with pytest.raises(BuildError, match=r"captions\.tsv"):
        read_captions(tmp_path / "captions.tsv")


def test_a_package_that_is_damaged_is_refused_with_a_sentence(tmp_path: Path) -> None:
    package, table = tmp_path / "a.deb", tmp_path / "captions.tsv"
    table.write_text("file\tcaption\thead\tcategory\na.png\tb\tc\td\n")
    header = f"{'data.tar.gz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{9:<10}`\n".encode()
    for data in (b"!<arch>\n" + header + b"no archive", b"!<arch>\n" + b"x" * 60, b"", b"!<arch>\n"):
        package.write_bytes(data)
        with pytest.raises(BuildError, match=r"a\.deb"):
            build("openclipart", tmp_path / "out", source=package, captions=table)
