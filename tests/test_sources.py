"""Builders of shards, and the corpus that is embedded."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageDraw
from PIL.PngImagePlugin import PngInfo

from mm.data.card import Card
from mm.data.shards import Record
from mm.data.sources import build, openclipart
from mm.data.sources.conversations import conversations
from mm.data.sources.splits import NEAR_COLOURS, NEAR_SHAPE, SPLITS, colours_of, split_by_group, without_near_duplicates
from mm.data.sources.staging import staged
from mm.data.sources.writer import BuildError, Member, rank, split_of, write_shards
from mm.media import decode, hamming, perceptual_hash
from mm.sample import Image, Sample, Text

DEMO = Path(__file__).parents[1] / "data_cards" / "demo"
INSTALLED = Path("/usr/share/openclipart/png")


def drawing(number: int, title: str = "", author: str = "", size: tuple[int, int] = (60, 50)) -> bytes:
    """A PNG of shapes that depend on the number, on a transparent ground."""
    picture = PillowImage.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    for step in range(5):
        x, y = rank(number, step, "x") % 40, rank(number, step, "y") % 30
        colour = tuple(rank(number, step, channel) % 200 for channel in "rgb")
        draw.rectangle((x, y, x + 18, y + 18), fill=(*colour, 255))
    texts = PngInfo()
    texts.add_text("Title", title)
    texts.add_text("Author", author)
    stream = io.BytesIO()
    picture.save(stream, "png", pnginfo=texts)
    return stream.getvalue()


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # pyright: ignore


def records(card: Card, split: str) -> list[Record]:
    scanned = [one for shard in card.shards(split) for one in card.open(shard).scan()]
    assert not [one.error for one in scanned if one.error]
    return [one.record for one in scanned if one.record]


def samples(card: Card, split: str) -> list[Sample]:
    return [card.sample(record) for record in records(card, split)]


# -------------------------------------------------------------------------------------------------------------- shards


def test_the_bytes_of_a_shard_depend_on_its_samples_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with staged(tmp_path / folder, ["train"]) as stage:
            write_shards([Member("x", {"txt": "dog", "json": {"n": 1}})], stage, "train", 10)
    first, second = (tmp_path / folder / "train-0000.tar" for folder in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert members(first) == {"x.txt": b"dog", "x.json": b'{"n":1}'}


def test_shards_are_cut_by_count_and_replace_those_of_an_earlier_build(tmp_path: Path) -> None:
    with staged(tmp_path, ["train"]) as stage:
        write_shards([Member(str(n), {"txt": "old"}) for n in range(5)], stage, "train", 1)
    with staged(tmp_path, ["train"]) as stage:
        assert write_shards([Member(str(n), {"txt": "new"}) for n in range(5)], stage, "train", 2) == 5
    shards = sorted(path.name for path in tmp_path.iterdir())
    assert shards == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert members(tmp_path / "train-0002.tar") == {"4.txt": b"new"}


def test_two_samples_with_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="'same'"), staged(tmp_path, ["train"]) as stage:
        write_shards([Member("same", {"txt": "a"}), Member("same", {"txt": "b"})], stage, "train", 10)
    assert not list(tmp_path.iterdir())


def test_the_validation_split_has_about_its_share() -> None:
    validation = sum(split_of(str(number), 0.1) == "validation" for number in range(10_000))
    assert 900 < validation < 1100


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("laion", {}, "there are openclipart, image-folder, llava-json"),
        ("image-folder", {"sorce": "x"}, "it has source, validation"),
        ("image-folder", {}, "needs source="),
        ("image-folder", {"source": "x", "validation": "a lot"}, "expected float"),
    ],
)
def test_a_wrong_name_or_option_is_answered_with_what_is_allowed(
    name: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, tmp_path, **options)


# ----------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_pictures_and_words_becomes_a_dataset(tmp_path: Path) -> None:
    source = tmp_path / "pets"
    (source / "cats").mkdir(parents=True)
    (source / "dog.png").write_bytes(drawing(1))
    (source / "dog.txt").write_text("a dog\n")
    (source / "cats" / "tom.v2.png").write_bytes(drawing(2))
    (source / "cats" / "tom.v2.json").write_text('{"caption": "a cat", "age": 3}')
    (source / "nobody.png").write_bytes(drawing(3))
    (source / "broken.png").write_bytes(drawing(4)[:20])
    (source / "broken.txt").write_text("a broken file")

    report = build("image-folder", tmp_path / "out", source=str(source), validation="0")

    assert report.samples == {"train": 2, "validation": 0}
    assert sum(report.skipped.values()) == 2
    found = samples(Card.load(tmp_path / "out" / "card.yaml"), "train")
    assert [(one.key, one.parts[1]) for one in found] == [("cats-tom_v2", Text("a cat")), ("dog", Text("a dog"))]
    assert found[1].media == (Image(drawing(1)),)


def test_of_two_pictures_that_give_one_name_the_first_is_a_sample_and_the_other_is_counted(tmp_path: Path) -> None:
    for name in ("a.b.png", "a_b.png"):
        (tmp_path / name).write_bytes(drawing(1))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    report = build("image-folder", tmp_path / "out", source=tmp_path, validation=0)
    assert [one.parts[1] for one in samples(Card.load(tmp_path / "out" / "card.yaml"), "train")] == [Text("a.b.png")]
    assert report.skipped == {"another picture gives a sample of this name; rename one": 1}
    assert list(report.skips.examples.values()) == ["a_b.png"]


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "an answer"}]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_conversations_become_chats_and_what_cannot_be_used_is_counted(tmp_path: Path, form: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "secret.png").write_bytes(drawing(9))
    for number in (1, 2):
        (images / f"{number}.png").write_bytes(drawing(number))
    told = [
        {"image": "1.png", "conversations": turns("<image>\nWhat is it?")},
        {"image": ["2.png", "1.png"], "conversations": turns("<image> or <image>?")},
        {"conversations": turns("Hello?")},
        {"image": "1.png", "conversations": turns("no marker")},
        {"image": "3.png", "conversations": turns("<image>")},
        {"image": "../secret.png", "conversations": turns("<image>")},
        "not a record",
    ]
    text = json.dumps(told) if form == "json" else "\n".join(map(json.dumps, told))
    (tmp_path / f"chats.{form}").write_text(text)

    report = build("llava-json", tmp_path / "out", source=tmp_path / f"chats.{form}", images=images, validation=0)

    assert report.samples == {"train": 3, "validation": 0}
    assert report.skipped == {
        "image markers and files differ": 1,
        "the file is not there": 1,
        "the path of a picture leads out of the folder": 1,
        "broken record": 1,
    }
    one, two, none = samples(Card.load(tmp_path / "out" / "card.yaml"), "train")
    assert one.media == (Image(drawing(1), "user"),)
    assert two.media == (Image(drawing(2), "user"), Image(drawing(1), "user"))
    assert not none.media
    assert none.parts[-1] == Text("an answer", role="assistant")


# ------------------------------------------------------------------------------------------------------- openclipart

FAR_APART = 40
CATEGORIES = ("animals", "food", "tools", "music", "plants")


def package(root: Path, drawings: dict[str, bytes]) -> Path:
    folder = root / openclipart.FOLDER_IN_PACKAGE
    for name, data in drawings.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return root


def table(path: Path, names: list[str]) -> Path:
    rows = [f"{name}\ta thing {number}\thead{number}\t{name.split('/')[0]}" for number, name in enumerate(names)]
    path.write_text("\n".join(["file\tcaption\thead\tcategory", *rows]) + "\n")
    return path


@pytest.fixture
def clipart(tmp_path: Path) -> tuple[Path, Path]:
    """A package of 200 drawings by 40 authors a category, and its table."""
    drawings = {
        f"{category}/{number}.png": drawing(1000 * place + number, author=f"Author {number % FAR_APART}")
        for place, category in enumerate(CATEGORIES)
        for number in range(FAR_APART)
    }
    return package(tmp_path / "unpacked", drawings), table(tmp_path / "captions.tsv", sorted(drawings))


def deb(path: Path, root: Path) -> Path:
    """A Debian package of a folder: an ar archive of three members."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        archive.add(root, arcname=".")
    with path.open("wb") as stream:
        stream.write(b"!<arch>\n")
        for name, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
            stream.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body)
            stream.write(b"\n" * (len(body) % 2))
    return path


def test_a_package_and_the_folder_it_unpacks_to_give_the_same_bytes(clipart: tuple[Path, Path], tmp_path: Path) -> None:
    root, captions = clipart
    build("openclipart", tmp_path / "from_folder", source=root, captions=captions)
    build("openclipart", tmp_path / "from_deb", source=deb(tmp_path / "a.deb", root), captions=captions)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("from_folder", "from_deb")
    ]
    assert contents[0] == contents[1]
    shards = {f"{split}-0000.tar" for split in SPLITS}
    assert shards | {"card.yaml", "instruct.yaml"} == set(contents[0])


def test_a_missing_package_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get download openclipart-png"):
        build("openclipart", tmp_path, source=tmp_path / "nothing", captions=table(tmp_path / "t.tsv", ["a/1.png"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\tcaption\n", "the columns are"),
        ("file\tcaption\thead\tcategory\na.png\t\tx\ty\n", "line 2"),
        ("file\tcaption\thead\tcategory\n" + "a.png\tb\tc\td\n" * 2, "twice, such as a.png"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "captions.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        openclipart.read_captions(tmp_path / "captions.tsv")


def test_a_drawing_in_the_corner_of_a_page_fills_its_picture() -> None:
    page = PillowImage.new("RGB", (400, 600), "white")
    page.paste("red", (10, 20, 50, 40))
    assert openclipart.trimmed(page, 160).size == (40, 20)
    assert openclipart.trimmed(page.resize((4000, 6000), PillowImage.Resampling.NEAREST), 160).size == (160, 80)


def test_metadata_in_the_wrong_encoding_is_put_right() -> None:
    known = openclipart.png_texts(drawing(1, title="SÃ©rgio", author="André"))
    assert (known["Title"], known["Author"]) == ("Sérgio", "André")


def test_one_person_has_one_identity() -> None:
    spellings = ("Architetto Francesco Rollandin", "Rollandin Francesco", "Francesco Rollandin (f@example.org)")
    assert {openclipart.identity(name) for name in spellings} == {"francesco-rollandin"}
    assert openclipart.identity("") == "unknown"


# ------------------------------------------------------------------------------------------------------------ splits


@dataclass(frozen=True, eq=False)
class Picture:
    key: str
    group: str
    category: str
    hash: int
    colours: np.ndarray
    caption: str = ""
    head: str = ""
    webp: bytes = b"picture"


def picture(number: int, group: str, category: str = "animals") -> Picture:
    seen = decode(Image(drawing(number)))
    assert isinstance(seen, PillowImage.Image)
    return Picture(f"{number}-{group}", group, category, perceptual_hash(seen), colours_of(seen))


def test_groups_stay_whole_and_every_category_is_in_every_split() -> None:
    pictures = [picture(n, f"{category}{n // 3}", category) for n, category in enumerate(CATEGORIES * 36)]
    splits = split_by_group(pictures, seed=0)
    groups = {split: {one.group for one in members} for split, members in splits.items()}
    assert not groups["train"] & groups["heldout"]
    assert not groups["train"] & groups["instruct"]
    assert not groups["instruct"] & groups["heldout"]
    assert all({one.category for one in members} == set(CATEGORIES) for members in splits.values())
    assert sum(map(len, splits.values())) == len(pictures)


def test_a_large_series_is_for_training() -> None:
    series = [picture(number, "series") for number in range(40)]
    splits = split_by_group(series + [picture(100 + n, f"single{n}") for n in range(60)], seed=0)
    assert set(series) <= set(splits["train"])


def test_a_copy_of_a_held_out_picture_leaves_the_other_splits() -> None:
    splits = {
        "train": [picture(1, "copy"), picture(2, "copy of another"), picture(3, "own")],
        "instruct": [picture(2, "x"), picture(1, "y")],
        "heldout": [picture(1, "original")],
    }
    kept = {split: [one.group for one in members] for split, members in without_near_duplicates(splits).items()}
    assert kept == {"train": ["own"], "validation": [], "instruct": ["x"], "heldout": ["original"]}


def test_a_recoloured_shape_is_another_picture() -> None:
    def flag(colour: str) -> Picture:
        seen = PillowImage.new("RGB", (60, 40), "white")
        seen.paste(colour, (0, 0, 60, 20))
        return Picture(colour, colour, "flags", perceptual_hash(seen), colours_of(seen))

    splits = {"train": [flag("red")], "instruct": [], "heldout": [flag("green")]}
    assert splits["train"][0].hash == splits["heldout"][0].hash
    assert len(without_near_duplicates(splits)["train"]) == 1


# ----------------------------------------------------------------------------------------------------- conversations


def labelled(per_category: int) -> list[Picture]:
    return [
        Picture(f"{category}{n}", "", category, 0, np.zeros(0), f"{category} thing {n}", f"{category}{n % 7}")
        for category in CATEGORIES
        for n in range(per_category)
    ]


def spoken(chats: list[Member], kind: str) -> list[list[dict[str, str]]]:
    return [one.fields["json"]["conversations"] for one in chats if one.key.endswith(f"-{kind}")]


def options(question: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-D])\. (.*)$", question, re.MULTILINE))


@pytest.mark.parametrize("kind", ["easy", "hard", "category"])
def test_the_words_of_a_choice_do_not_tell_the_answer(kind: str) -> None:
    chats = spoken(list(conversations(labelled(24), seed=0)), kind)
    assert len(chats) > 100
    right, offered, letters = Counter(), Counter(), Counter()
    for question, answer in chats:
        choices = options(question["value"])
        right[choices[answer["value"]]] += 1
        offered.update(choices.values())
        letters[answer["value"]] += 1
    assert all(offered[option] == 4 * right[option] for option in offered)
    assert len(set(letters.values())) == 1


def test_a_caption_is_asked_for_as_often_with_yes_as_with_no() -> None:
    chats = list(conversations(labelled(24), seed=0))
    asked = {kind: Counter(chat[0]["value"] for chat in spoken(chats, kind)) for kind in ("yes", "no")}
    assert asked["yes"] == asked["no"]
    assert all(chat[1]["value"] == kind for kind in asked for chat in spoken(chats, kind))


def test_no_wrong_option_has_the_head_of_the_right_one() -> None:
    pictures = labelled(24)
    heads = {one.caption: one.head for one in pictures}
    for question, _ in spoken(list(conversations(pictures, seed=0)), "hard"):
        assert len({heads[option] for option in options(question["value"]).values()}) == 4


def test_a_question_about_two_pictures_has_a_marker_for_each() -> None:
    chats = [one for one in conversations(labelled(8), seed=0) if one.key.endswith("-pair")]
    answers = Counter(one.fields["json"]["conversations"][1]["value"] for one in chats)
    assert answers["first"] == answers["second"] == len(chats) / 2
    for one in chats:
        assert set(one.fields) == {"0.webp", "1.webp", "json"}
        assert one.fields["json"]["conversations"][0]["value"].startswith("<image>\n<image>\nWhich picture shows")


# ---------------------------------------------------------------------------------------------------- embedded corpus


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict[str, str]]]:
    card = Card.load(DEMO / "card.yaml")
    return {split: [json.loads(one.fields["json"]) for one in records(card, split)] for split in ("train", "heldout")}


def test_the_embedded_corpus_is_as_large_as_it_says_and_small_in_git(corpus: dict[str, list[dict[str, str]]]) -> None:
    card, chats = Card.load(DEMO / "card.yaml"), Card.load(DEMO / "instruct.yaml")
    for split, found in corpus.items():
        assert len(found) == card.statistics[split]["samples"]
        assert Counter(one["category"] for one in found) == card.statistics[split]["categories"]
    assert len(records(chats, "train")) == chats.statistics["train"]["samples"]
    assert len(corpus["train"]) >= 1800
    assert len(corpus["heldout"]) >= 480
    assert sum(len(zlib.compress(path.read_bytes())) for path in DEMO.iterdir()) <= 8_000_000


def test_every_embedded_record_gives_a_sample_whose_pictures_decode() -> None:
    card, chats = Card.load(DEMO / "card.yaml"), Card.load(DEMO / "instruct.yaml")
    seen: set[bytes] = set()
    for sample in [
        *samples(card, "train"),
        *samples(card, "validation"),
        *samples(card, "heldout"),
        *samples(chats, "train"),
    ]:
        for part in sample.media:
            if isinstance(part, Image) and part.data not in seen:
                seen.add(part.data)
                item = decode(part)
                assert isinstance(item, PillowImage.Image)
                assert max(item.size) <= 160


def test_embedded_captions_are_those_of_the_table(corpus: dict[str, list[dict[str, str]]]) -> None:
    rows = {row.file: row for row in openclipart.read_captions(DEMO / "captions.tsv")}
    for one in [*corpus["train"], *corpus["heldout"]]:
        assert rows[one["file"]] == (one["file"], one["caption"], one["head"], one["category"])
    assert all(1 <= len(row.caption.split()) <= 8 for row in rows.values())


def test_embedded_splits_share_no_group_and_no_picture() -> None:
    card, chats = Card.load(DEMO / "card.yaml"), Card.load(DEMO / "instruct.yaml")
    pictures: dict[str, dict[bytes, tuple[int, np.ndarray]]] = defaultdict(dict)
    groups = {split: {json.loads(one.fields["json"])["group"] for one in records(card, split)} for split in card.splits}
    for one, other in itertools.combinations(card.splits, 2):
        assert not groups[one] & groups[other]
    found = {split: samples(card, split) for split in card.splits} | {"instruct": samples(chats, "train")}
    for split, members in found.items():
        for part in {part for sample in members for part in sample.media}:
            item = decode(part)
            assert isinstance(item, PillowImage.Image)
            pictures[split][part.data] = perceptual_hash(item), colours_of(item).astype(np.int16)
    # The builder compared pictures before they were encoded; near its limits, lossy coding may move a pair either way.
    shape, colours = NEAR_SHAPE - 3, NEAR_COLOURS - 3
    for one, other in itertools.combinations(found, 2):
        for first, seen in pictures[one].values():
            for second, compared in pictures[other].values():
                assert hamming(first, second) > shape or np.abs(seen - compared).mean() > colours


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED.is_dir(), reason="needs Debian's package openclipart-png")
def test_the_embedded_corpus_is_reproduced_byte_for_byte(tmp_path: Path) -> None:
    build("openclipart", tmp_path, source=INSTALLED)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DEMO / path.name).read_bytes(), path.name
