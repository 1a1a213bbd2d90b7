"""Pages: what they show is what was trained and scored, and they hold up against hostile data and missing pieces."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image as PillowImage

from mm.evaluate import (
    CaptionedPicture,
    FrozenFeatures,
    Options,
    Prompt,
    Results,
    Scored,
    ScoredQuestion,
    Suite,
    build_choice_suite,
    evaluate,
)
from mm.packing.collate import Processor
from mm.report.charts import line_chart, share_stack, ticks
from mm.report.history import History
from mm.report.packs import DocumentView, PackView, inspect_page, render_packs, view_document, view_pack, view_packs
from mm.report.page import duration, milliseconds, short
from mm.report.pictures import picture_of
from mm.report.run import SAMPLES, Stage, report_of_run, run_page
from mm.sample import PointCloud, Sample, Speech, Text
from mm.tokenizers.text import TextTokenizer
from mm.train.dataset import PlannedData
from mm.train.preview import planned
from mm.train.recipe import Recipe
from tests.small_world import SOURCES, picture, train_here, write_recipe, write_source

HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "img", "br", "hr", "link", "input", "rect", "line", "circle", "path", "polyline"}


# ------------------------------------------------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Path], tokenizer_folder: Path) -> Path:
    """A run of four steps over all sources, with validation."""
    recipe = write_recipe(tmp_path_factory.mktemp("report"), corpus, tokenizer_folder)
    return train_here(recipe, "steps=4", "validate_every=2")


@pytest.fixture(scope="module")
def data(run: Path) -> PlannedData:
    return planned(Recipe.load(run / "recipe.yaml"))


def records(categories: int = 5, pictures: int = 6) -> list[CaptionedPicture]:
    return [
        CaptionedPicture(f"{c}/{n}", picture(100 * c + n), f"thing {c} {n}", f"class {c}", f"{c}-{n}")
        for c in range(categories)
        for n in range(pictures)
    ]


class Knowing:
    """Knows the captions of the pictures whose number is not a multiple of three, and says the same letter always."""

    def __init__(self, records: Sequence[CaptionedPicture], letter: str = "B") -> None:
        self.captions = {record.image: record.caption for number, record in enumerate(records) if number % 3}
        self.letter = letter

    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        return [
            [
                Scored(-float(sum(map(ord, option)) % 7) + 50.0 * (self.captions.get(q.picture or b"") == option), 3)
                for option in q.options
            ]
            for q in questions
        ]

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        return [self.letter] * len(prompts)


RECORDS = records()
SUITE = build_choice_suite(RECORDS, easy_per_picture=1, hard_per_picture=2, seed=0)


def scored(generation: int | None = 8, baselines: bool = True, suite: Suite = SUITE) -> Results:
    noise = np.random.default_rng(0).normal(size=(len(RECORDS), 4))
    features = FrozenFeatures(
        {record.id: noise[number] for number, record in enumerate(RECORDS)},
        noise,
        [record.caption for record in RECORDS],
        [record.category for record in RECORDS],
    )
    options = Options(generation_questions=generation, resamples=100)
    return evaluate(suite, Knowing(RECORDS), options, features=features if baselines else None)


RESULTS = scored()


def text_of(page: str) -> str:
    """What a reader sees: no tags, no style, white space as one space."""
    without = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", without)).replace("\u202f", " ").split())


class Balance(HTMLParser):
    """Raises where a tag closes another than the one that was opened last."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen[tag] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> at {self.getpos()} closes nothing"
            assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def check_page(page: str) -> None:
    """Well-formed, and in need of nothing from elsewhere."""
    balance = Balance(page)
    assert balance.seen["script"] == balance.seen["link"] == balance.seen["iframe"] == 0
    sources = re.findall(
        r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]+)""", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    )
    assert all(source.startswith("data:image/") for source in sources)
    assert "http://" not in page
    assert "https://" not in page


# --------------------------------------------------------------------------------------------------------------- packs


def test_the_page_of_a_step_is_whole_and_shows_every_media_item_of_its_packs(data: PlannedData) -> None:
    media = [sum(data.plan.media_tokens(pack) for pack in data.plan.batch(step)) for step in range(8)]
    step = next(step for step, tokens in enumerate(media) if np.all(tokens))
    page = inspect_page(data, step, packs_shown=4)
    check_page(page)
    views = [view_pack(data, number) for number in data.plan.batch(step)]
    items = [span for view in views for span in view.spans if span.modality != "text"]
    assert {item.modality for item in items} == {"image", "speech", "point"}
    assert page.count('src="data:image/') == len(items)
    total = sum(len(data.plan.pack(number).row) for number in data.plan.batch(step))
    assert f"4 packs · {total} documents" in text_of(page)


def test_a_view_counts_the_tokens_that_the_model_gets(data: PlannedData) -> None:
    for number in data.plan.batch(1):
        view, rows = view_pack(data, number), data.plan.pack(number)
        documents = [
            data.blueprint.processor.document(data.samples[one.source].sample(one.shard, one.row, one.choice))
            for one in rows.samples()
        ]
        modality = np.concatenate([document.modality for document in documents])
        weights = np.concatenate([document.weights for document in documents])
        assert [document.length for document in view.documents] == rows.length.tolist()
        assert view.with_loss == (weights > 0).sum()
        names = ("text", "image", "speech", "point")
        assert view.by_modality == {n: int((modality == i).sum()) for i, n in enumerate(names) if (modality == i).any()}
        borders = [0, *np.cumsum([segment.width for segment in view.segments]).tolist()]
        assert [segment.start for segment in view.segments] == borders[:-1]
        assert borders[-1] == view.tokens == round(view.fill * view.capacity)


def test_the_text_spans_of_a_document_are_its_text(data: PlannedData) -> None:
    tokenizer = data.blueprint.processor.text
    for source in range(len(SOURCES)):
        sample = data.samples[source].sample(0, 0)
        document = data.blueprint.processor.document(sample)
        view = view_document("one", sample, data.blueprint.processor)
        shown = "".join(span.text for span in view.spans if span.modality == "text")
        assert shown == tokenizer.decode(document.tokens[document.modality == 0].tolist())


def test_a_chat_is_shown_in_turns_and_only_the_assistant_bears_loss(data: PlannedData) -> None:
    sample = data.samples[SOURCES.index("chats")].sample(0, 1)
    view = view_document("a chat", sample, data.blueprint.processor)
    assert [turn.role for turn in view.turns] == ["user", "assistant"]
    asked, answered = ([span for span in turn.spans if not span.scaffold] for turn in view.turns)
    assert [span.modality for span in asked] == ["image", "text"]
    texts = [part.text.strip() for part in sample.parts if isinstance(part, Text)]
    assert asked[1].text == texts[0]
    assert [span.weight for span in asked] == [0.0, 0.0]
    assert [(span.text, span.weight) for span in answered] == [(texts[-1], 1.0)]
    ends = [span for turn in view.turns for span in turn.spans if span.scaffold and span.weight > 0]
    assert [span.text for span in ends] == ["<|im_end|>"]


def test_characters_of_several_tokens_are_shown_whole(tokenizer: TextTokenizer) -> None:
    words = "naïve ☃ 日本"
    view = view_document("one", Sample("source", "key", (Text(words),)), Processor(tokenizer, {}))
    assert [(span.text, span.scaffold) for span in view.spans] == [(words, False), ("<|im_end|>", True)]
    assert view.length == len(words.encode()) + 1


def test_cut_and_broken_samples_are_marked(tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path) -> None:
    cards = {"pairs": {"card": str(write_source(tmp_path, "pairs", rows=8, broken=(3,)))}}
    changes = {"data": {"sources": cards, "index": str(tmp_path / "cache"), "workers": 0}, "epochs": 1.0, "steps": None}
    broken = write_recipe(tmp_path, corpus, tokenizer_folder, **changes)
    data = planned(Recipe.load(broken))
    views = [view_pack(data, number) for number in range(data.plan.planned)]
    notes = [document.note for view in views for document in view.documents if document.note]
    assert len(notes) == 1
    assert notes[0].startswith("broken, replaced by padding: ")
    assert "broken, replaced by padding" in text_of(render_packs(views, title="packs", subtitle=""))

    texts = {"sources": {"text": {"card": str(corpus["text"])}}, "index": str(tmp_path / "cache"), "workers": 0}
    packing = {"capacity": 24, "batch": 4, "window": 32, "too_long": "truncate"}
    recipe = write_recipe(tmp_path, corpus, tokenizer_folder, data=texts, packing=packing, run=str(tmp_path / "cut"))
    cut = [document for view in view_packs(Recipe.load(recipe), 0, 4) for document in view.documents]
    assert {document.note for document in cut} >= {"text cut at the end"}
    assert all((document.length == 24) == (document.note == "text cut at the end") for document in cut)


def test_a_hostile_sample_is_shown_as_text(tokenizer: TextTokenizer) -> None:
    view = view_document(HOSTILE, Sample("source", HOSTILE, (Text(HOSTILE),)), Processor(tokenizer, {}), note=HOSTILE)
    page = render_packs(
        [PackView(0, 64, (view, DocumentView(HOSTILE, 3, (), HOSTILE)))], title=HOSTILE, subtitle=HOSTILE
    )
    check_page(page)
    assert "<script" not in page
    assert text_of(page).count(HOSTILE) >= 5


# ------------------------------------------------------------------------------------------------------------ pictures


def decoded(url: str) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_waveform_is_drawn_where_it_sounds() -> None:
    stream = io.BytesIO()
    silence, noise = np.zeros(4000), np.random.default_rng(0).uniform(-1, 1, 4000)
    soundfile.write(stream, np.concatenate([silence, noise]), 8000, format="WAV")
    drawn = np.asarray(decoded(picture_of(Speech(stream.getvalue()))).convert("L")) < 128
    half = drawn.shape[1] // 2
    assert drawn[:, half:].mean() > 0.6
    assert drawn[:, : half - 1].mean() < 0.05


def test_a_point_cloud_keeps_its_colours_and_near_points_hide_far_ones() -> None:
    line = np.array([[0.0, -1.0, 0.0, 1, 0, 0], [0.0, 1.0, 0.0, 0, 0, 1]])
    across = np.array([[1.0, 0.0, 0.0, 0, 1, 0], [-1.0, 0.0, 0.0, 0, 1, 0]])
    stream = io.BytesIO()
    np.save(stream, np.concatenate([line, across]).astype(np.float32))
    drawn = np.asarray(decoded(picture_of(PointCloud(stream.getvalue()))).convert("RGB")).reshape(-1, 3)
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= {tuple(pixel) for pixel in drawn.tolist()}


# -------------------------------------------------------------------------------------------------------------- charts


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 290) == [0, 50, 100, 150, 200, 250]
    assert ticks(0.98, 3.6) == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert ticks(-0.001, 0.004) == [-0.001, 0.0, 0.001, 0.002, 0.003, 0.004]


def test_a_steep_start_leaves_the_frame_and_is_counted() -> None:
    chart = line_chart({"training": [(1, 500.0), (2, 3.0), *((step, 3.0 - step / 100) for step in range(3, 31))]})
    assert chart.above == 1
    heights = [y for _, y in chart.lines[0].points]
    assert heights[0] < 0
    assert all(0 <= y <= 100 for y in heights[1:])
    assert heights[1:] == sorted(heights[1:])
    assert chart.lines[0].points[-1][0] == 100


def test_a_chart_of_one_point_has_a_frame() -> None:
    chart = line_chart({"training": [], "validation": [(5, 2.5)]})
    assert [line.label for line in chart.lines] == ["validation"]
    assert chart.lines[0].points == ((100.0, pytest.approx(50.0)),)
    with pytest.raises(ValueError, match="at least one point"):
        line_chart({"training": []})


def test_layers_of_a_stack_lie_on_each_other_and_hold_from_the_report_before() -> None:
    chart = share_stack([10, 40], {"data": [0.5, 0.25], "forward": [0.5, 0.75]})
    data, forward = chart.areas
    assert data.points == ((0, 50), (25, 50), (25, 75), (100, 75), (100, 100), (25, 100), (25, 100), (0, 100))
    assert forward.points[:4] == ((0, 0), (25, 0), (25, 0), (100, 0))
    assert forward.points[4:] == tuple(reversed(data.points[:4]))
    assert [tick.label for tick in chart.x] == ["0", "10", "20", "30", "40"]


# ----------------------------------------------------------------------------------------------------- report of a run


def test_the_report_of_a_run_shows_its_figures(run: Path) -> None:
    page = report_of_run(run)
    check_page(page)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = text_of(page)
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert f"{lines[0]['loss']:.3f} → {lines[-1]['loss']:.3f}" in text
    assert f"{validation[0]:.3f} → {validation[-1]:.3f}" in text
    assert f"Tokens, media included {lines[-1]['tokens']:,}" in text
    assert "Stage run trained the image encoder, the speech encoder" in text
    assert (run / "recipe.yaml").read_text().strip().splitlines()[0] in text
    assert json.loads((run / "versions.json").read_text())["torch"] in text


def test_the_report_shows_where_time_and_memory_go_and_the_loss_of_every_source(run: Path) -> None:
    page = report_of_run(run)
    text = text_of(page)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = re.findall(r'<polygon class="of-(\w+)"', page)
    assert phases == ["data", "sync", "forward", "backward", "optimizer", "rest"]
    assert all(re.search(rf"{phase} [\d.]+ %, [\d.,]+ ms a step", text) for phase in phases)
    assert all(re.search(rf"{part} [\d.]+ %, [\d.]+ [kMG]B", text) for part in ("parameters", "gradients", "rest"))
    for source in SOURCES:
        values = [line[f"loss/source/{source}"] for line in lines if f"loss/source/{source}" in line]
        shown = " → ".join(f"{value:.3f}" for value in dict.fromkeys((values[0], values[-1])))
        assert f"source {source} {shown} –" in text
    held_out = [line["validation_loss/source/held_out"] for line in lines if "validation_loss" in line]
    assert f"source held_out – {held_out[0]:.3f} → {held_out[-1]:.3f}" in text


def test_figures_of_a_run_are_means_over_time(run: Path, tmp_path: Path) -> None:
    """10 steps of 1 s with 100 tokens/s, then 20 of 2 s with 400: 17,000 tokens in 50 s."""
    copy = shutil.copytree(run, tmp_path / "copy")
    shared = {"flops/decoder": 1.0, "flops/encoders": None, "mfu": 0.5, "memory/parameters": 3e9, "memory/rest": 1e9}
    shared["memory/peak"] = 4e9
    reports = [
        {"step": 10, "loss": 2.0, "seconds_per_step": 1.0, "tokens_per_second": 100, "fill": 0.5, "tokens": 1000},
        {"step": 30, "loss": None, "seconds_per_step": 2.0, "tokens_per_second": 400, "fill": 1.0, "tokens": 17000},
    ]
    flops = (
        {"flops_per_second": 3e9, "time/data": 0.5, "time/sync": 0.0, "time/forward": 0.5},
        {"flops_per_second": 1e9, "time/data": 0.0, "time/sync": 0.0, "time/forward": 1.0},
    )
    lines = [json.dumps(shared | report | more) + "\n" for report, more in zip(reports, flops, strict=True)]
    (copy / "metrics.jsonl").write_text("".join(lines))
    history = History.read(Stage("copy", copy))
    rate = history.throughput
    assert (rate.seconds, rate.tokens_per_second, rate.share_of_peak) == (50.0, 340.0, ("mfu", 0.5))
    assert rate.fill == pytest.approx(17_000 / (2_000 + 16_000))
    assert rate.flops_per_second == pytest.approx(1.4e9)
    assert rate.flops == {"decoder": pytest.approx(1.0)}
    assert history.points("loss") == [(10, 2.0)]
    text = text_of(report_of_run(copy))
    assert rate.time == {"data": pytest.approx(5 / 50), "forward": pytest.approx(45 / 50)}
    assert "MFU (of the data sheet) 50.0 %" in text
    assert "data 10.0 %, 167 ms a step forward 90.0 %, 1,500 ms a step" in text
    assert "parameters 75.0 %, 3 GB rest 25.0 %, 1 GB" in text
    assert "Peak memory of a process 4 GB" in text
    assert "decoder 100.0 %, 1.4 GFLOP/s" in text
    assert "Validation loss" not in text
    assert "held-out" not in text


def test_what_is_frozen_is_said(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    recipe = (copy / "recipe.yaml").read_text()
    parts = r"  parts: [{match: '^encoders\.', freeze: true}, {match: embedding, freeze: true}]"
    (copy / "recipe.yaml").write_text(re.sub(r"  parts: \[\]", lambda _: parts, recipe))
    history = History.read(Stage("copy", copy))
    assert history.frozen == ["the image encoder", "the speech encoder", "the point encoder"]
    assert history.trained == ["the image adapter", "the speech adapter", "the point adapter", "the language model"]
    assert history.exceptions == ["embedding"]


def test_a_run_that_has_reported_nothing_says_so(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has not reported yet"):
        report_of_run(copy)
    with pytest.raises(FileNotFoundError, match="metrics"):
        report_of_run(tmp_path / "elsewhere")


def test_the_ledger_is_shown_as_text(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "ledger.jsonl").write_text(json.dumps({"event": HOSTILE}) + "\n")
    page = report_of_run(copy)
    check_page(page)
    assert "Events in the ledger 1" in text_of(page)
    assert HOSTILE in text_of(page)


# ------------------------------------------------------------------------------------------------ report of the scores


def test_the_bars_show_the_figures_of_the_results(run: Path, data: PlannedData) -> None:
    packs = [view_pack(data, 0, "run, step 0")]
    page = run_page("A run", [Stage("first", run), Stage("second", run)], SUITE, RESULTS, packs)
    check_page(page)
    text, summary = text_of(page), RESULTS.summary

    def shown(label: str, name: str) -> str:
        value = summary.get(name, summary["baselines"].get(name))
        low, high = summary["intervals"][name]
        return f"{label} {100 * value:.1f} {100 * low:.1f} to {100 * high:.1f}"

    for part in ("", "_easy", "_hard"):
        assert shown("The model", f"accuracy{part or '_likelihood'}") in text
        assert shown("shown another picture", f"shuffled_images{part}") in text
        assert shown("shown no picture", f"text_only{part}") in text
        assert shown("Captions of similar pictures", f"nearest_captions{part}") in text
        assert shown("Linear probe of the encoder", f"linear_probe{part}") in text
    assert shown("One order of the options", "accuracy_generation") in text
    assert shown("Every order right (circular)", "circular") in text
    assert f"All questions {summary['questions']} questions" in text
    assert "Answered in its own words 8 questions" in text
    for name, found in summary["categories"].items():
        assert f"{name} {found['questions']} {100 * found['accuracy']:.1f}" in text
    assert "run, step 0, pack 0" in text


def test_the_bars_are_as_long_as_their_figures_say(run: Path) -> None:
    page = run_page("A run", [Stage("first", run)], SUITE, RESULTS)
    figures = [float(number) for number in re.findall(r'class="number"><b>([\d.]+)</b>', page)]
    widths = [float(width) for width in re.findall(r'class="value" x="0" y="2" width="([\d.]+)"', page)]
    assert widths == pytest.approx(figures, abs=0.051)
    assert set(re.findall(r'class="chance" x1="([\d.]+)"', page)) == {"25.00", "0.39"}


def test_samples_are_as_often_right_as_the_whole_and_show_no_picture_twice(run: Path) -> None:
    page = run_page("A run", [Stage("first", run)], SUITE, RESULTS)
    verdicts = re.findall(r'<article class="sample whole (\w+)">', page)
    right = np.mean([answer.right == 1 for answer in RESULTS.answers])
    assert len(verdicts) == SAMPLES
    assert verdicts.count("right") == pytest.approx(SAMPLES * right, abs=1)
    assert verdicts.count("right") < SAMPLES
    pictures = re.findall(r'<div class="frame"><img src="([^"]+)"', page)
    assert len(set(pictures)) == SAMPLES
    marked = page.count('<li class="chosen answer">')  # of options that tie, the first is the chosen one
    assert verdicts.count("right") <= marked <= verdicts.count("right") + verdicts.count("tied")
    assert page == run_page("A run", [Stage("first", run)], SUITE, RESULTS)


def test_a_report_does_without_generation_baselines_and_hard_questions(run: Path) -> None:
    easy = replace(SUITE, questions=tuple(question for question in SUITE.questions if question.difficulty == "easy"))
    page = run_page("A run", [Stage("first", run)], easy, scored(generation=0, baselines=False, suite=easy))
    check_page(page)
    text = text_of(page)
    assert "The model" in text
    for absent in ("Answered in its own words", "Linear probe", "linear probe", "Hard", "What a pack looks like"):
        assert absent not in text


def test_hostile_questions_are_shown_as_text(run: Path) -> None:
    spoiled = [
        replace(record, category=HOSTILE if record.category == "class 1" else record.category) for record in RECORDS
    ]
    spoiled = [replace(record, caption=record.caption + HOSTILE) for record in spoiled]
    suite = build_choice_suite(spoiled, 1, 2, seed=0)
    suite = replace(suite, questions=tuple(replace(question, text=HOSTILE) for question in suite.questions))
    results = evaluate(suite, Knowing(spoiled, letter=HOSTILE), Options(generation_questions=None, resamples=20))
    page = run_page(HOSTILE, [Stage(HOSTILE, run)], suite, results)
    check_page(page)
    assert "<script" not in page
    assert text_of(page).count(HOSTILE) > 4 * SAMPLES


def test_a_picture_that_cannot_be_read_is_left_out(run: Path) -> None:
    pictures = {name: b"no picture " + name.encode() for name in SUITE.pictures}
    page = run_page("A run", [Stage("first", run)], replace(SUITE, pictures=pictures), RESULTS)
    check_page(page)
    assert text_of(page).count("no picture") >= SAMPLES


# ------------------------------------------------------------------------------------------------------------- numbers


def test_numbers_read_well() -> None:
    assert [duration(seconds) for seconds in (4.6, 99.4, 660, 7500)] == ["5 s", "99 s", "11 min", "2 h 05 min"]
    assert [milliseconds(seconds) for seconds in (2.1e-4, 0.0171, 1.5)] == ["0.21 ms", "17.1 ms", "1,500 ms"]
    numbers = [short(value).replace("\u202f", " ") for value in (950, 12_345, 999_950, 6.1e9)]
    assert numbers == ["950", "12.3 k", "1 M", "6.1 G"]
