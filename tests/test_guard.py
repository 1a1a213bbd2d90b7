"""The guard goes back when the loss spikes, past the batches that did it, and the run is as one that never met them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mm.configure import RecipeError
from mm.train import checkpoint
from mm.train.guard import Guard, GuardOptions
from mm.train.stages import RunError
from tests.shard_files import write_card, write_tar
from tests.small_world import FORMS, losses, seen, train_here, train_together, write_recipe

pytestmark = pytest.mark.timeout(300)

GUARD = "guard={window: 16, patience: 3}"
BATCH = 4  # packs; a text of 100 bytes fills a pack of 128 tokens alone


# ------------------------------------------------------------------------------------------------------------ judging


def judge(folder: Path, levels: list[float], **options: float) -> list[int]:
    """Steps at which a guard finds a spike in some losses."""
    folder.mkdir(exist_ok=True)
    guard = Guard(GuardOptions(**options), folder, range(1, 1), writes=True)  # type: ignore[arg-type]
    return [step for step, loss in enumerate(levels, start=1) if guard.judge(step, loss, [])]


def noise(count: int, level: float = 2.0, spread: float = 0.05) -> list[float]:
    return (level + spread * np.random.default_rng(0).normal(size=count)).tolist()


def test_losses_that_are_high_in_a_row_are_a_spike(tmp_path: Path) -> None:
    assert judge(tmp_path, [*noise(50), 3.0, 3.1, 3.2, *noise(20)], window=32) == [53]


def test_a_single_high_loss_is_none(tmp_path: Path) -> None:
    assert judge(tmp_path, [*noise(50), 3.0, 3.0, *noise(2), 3.0], window=32) == []


def test_a_loss_that_is_not_finite_is_high(tmp_path: Path) -> None:
    assert judge(tmp_path, [*noise(50), float("nan"), float("inf"), float("nan")], window=32) == [53]


def test_noise_and_a_falling_loss_are_no_spikes(tmp_path: Path) -> None:
    falling = (8 * np.exp(-np.arange(3000) / 700) + 0.05 * np.random.default_rng(1).normal(size=3000)).tolist()
    assert judge(tmp_path, falling) == []


def test_the_threshold_is_in_standard_deviations(tmp_path: Path) -> None:
    usual = noise(2000, spread=0.05)
    window = len(usual)
    assert judge(tmp_path / "a", [*usual, *[2.0 + 0.05 * 6.5] * 3], window=window) == [window + 3]
    assert judge(tmp_path / "b", [*usual, *[2.0 + 0.05 * 5.5] * 3], window=window) == []


def test_nothing_is_judged_before_the_window_is_full(tmp_path: Path) -> None:
    assert judge(tmp_path, [*noise(31), 9.0, 9.0, 9.0], window=32) == []


def test_a_new_level_is_usual_after_a_spike_that_stays(tmp_path: Path) -> None:
    assert judge(tmp_path, [*noise(50), *noise(100, level=4.0), *[6.0] * 3], window=32) == [53, 153]


def test_a_resumed_guard_judges_as_one_that_was_never_broken(tmp_path: Path) -> None:
    levels = [*noise(50), 3.0, *noise(5), *noise(60, level=4.0), *[6.0] * 3]
    expected = judge(tmp_path / "unbroken", levels, window=16)
    assert len(expected) == 2
    found = []
    for begin in range(0, len(levels), 7):  # a restart every 5 steps, each from a checkpoint that is 2 steps old
        guard = Guard(GuardOptions(window=16), tmp_path, range(1, max(begin - 1, 1)), writes=True)
        for step in range(max(begin - 1, 1), min(begin + 7, len(levels)) + 1):
            if guard.judge(step, levels[step - 1], []):
                found.append(step)
    assert sorted(set(found)) == expected


def test_a_stage_is_judged_by_its_own_losses(tmp_path: Path) -> None:
    judge(tmp_path, noise(50), window=32)
    guard = Guard(GuardOptions(window=32), tmp_path, range(51, 51), writes=True)
    later = [*noise(40, level=4.0), 6.0, 6.0, 6.0]
    assert [step for step, loss in enumerate(later, start=51) if guard.judge(step, loss, [])] == [93]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    judge(tmp_path, noise(5))
    with (tmp_path / "guard.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"guard\.jsonl, line 6 is no JSON object with a `step`"):
        Guard(GuardOptions(), tmp_path, range(1, 9), writes=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 4}, "guard.window is 4 and must be at least 8"), ({"threshold": 0.0}, "guard.threshold is 0.0")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GuardOptions(**options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ rewinding


def texts(batches: int, seed: int) -> list[bytes]:
    """Words that the model learns soon."""
    draw = np.random.default_rng(seed)
    return [b"the cat sees %s and the dog sees " % draw.choice([b"red", b"two"]) * 3 for _ in range(BATCH * batches)]


def garbage(batches: int) -> list[bytes]:
    """Letters at random, in each batch other ones."""
    draw = np.random.default_rng(9)
    return ["".join(map(chr, draw.integers(33, 127, 100))).encode() for _ in range(BATCH * batches)]


@pytest.fixture
def cards(tmp_path: Path) -> dict[str, Path]:
    """Shards in their order: `spoiled` is learned, passed over, garbage, goes on; `clean` is learned, goes on."""
    shards = {"learned": texts(20, 1), "passed-over": texts(4, 2), "garbage": garbage(3), "goes-on": texts(13, 3)}
    for name, contents in shards.items():
        write_tar(tmp_path / f"{name}.tar", [(f"{row:04d}.txt", text[:100]) for row, text in enumerate(contents)])
    (tmp_path / "cache").mkdir()
    cards = {}
    for name, order in {"spoiled": list(shards), "clean": ["learned", "goes-on"]}.items():
        (tmp_path / name).mkdir()
        paths = [f"../{shard}.tar" for shard in order]
        cards[name] = write_card(tmp_path / name, paths, FORMS["text"], name="text")
    return cards | {"text": cards["spoiled"], "held_out": cards["clean"]}


@pytest.fixture
def spoiled(tmp_path: Path, cards: dict[str, Path], tokenizer_folder: Path) -> Path:
    return recipe_of("spoiled", tmp_path, cards, tokenizer_folder)


@pytest.fixture
def clean(tmp_path: Path, cards: dict[str, Path], tokenizer_folder: Path) -> Path:
    return recipe_of("clean", tmp_path, cards, tokenizer_folder)


def recipe_of(name: str, tmp_path: Path, cards: dict[str, Path], tokenizer_folder: Path) -> Path:
    return write_recipe(
        tmp_path / name,
        cards,
        tokenizer_folder,
        [name],
        steps=33,
        save_every=20,
        model={
            "decoder": {
                "config": {
                    "vocabulary": 259,
                    "width": 32,
                    "layers": 2,
                    "heads": 2,
                    "kv_heads": 1,
                    "head_dim": 16,
                    "ffn": 64,
                }
            }
        },
        packing={"capacity": 128, "batch": BATCH, "policy": "in-order"},
        optim={"lr": 1e-2},
    )


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_run_goes_back_past_the_batches_as_if_it_had_never_met_them(clean: Path, spoiled: Path) -> None:
    expected, run = train_here(clean), train_here(spoiled, GUARD, "validate_every=0")
    (event,) = events(run)
    assert str(event["event"]).startswith("the loss spiked up to step 27: ")
    assert {str(name).split(",")[1] for name in event["samples"]} == {" garbage.tar"}  # type: ignore[attr-defined]
    assert len(event["samples"]) == 3 * BATCH  # type: ignore[arg-type]
    assert list(losses(run).values()) == list(losses(expected).values())
    position = checkpoint.read_position(checkpoint.find(run))
    assert (position.step, position.packs, position.passed_over, position.rewinds) == (33, 40 * BATCH, 7 * BATCH, 1)


def test_without_the_guard_the_garbage_is_learned(spoiled: Path) -> None:
    run = train_here(spoiled)
    assert max(losses(run)[step] for step in (25, 26, 27)) > 2 * losses(run)[24]
    assert not (run / "guard.jsonl").exists()


def test_several_processes_go_back_together(clean: Path, spoiled: Path, tmp_path: Path) -> None:
    runs = [[str(clean)], [str(spoiled), GUARD]]
    train_together(tmp_path, 2, runs)
    expected, run = clean.parent / "run", spoiled.parent / "run"
    assert list(losses(run).values()) == pytest.approx(list(losses(expected).values()), rel=1e-3)
    assert len(seen(run)) == 33
    assert sum(len(event["samples"]) for event in events(run)) == 3 * BATCH  # type: ignore[arg-type,misc]


def test_a_run_that_is_broken_off_after_it_went_back_does_not_meet_them_again(clean: Path, spoiled: Path) -> None:
    with pytest.raises(SystemExit):
        train_here(spoiled, GUARD, "steps=100000", "time_limit=1s")  # one step
    train_here(spoiled, GUARD, "steps=25")
    run = train_here(spoiled, GUARD, "steps=28")  # at 27 back to 20, then to 28
    assert len(events(run)) == 1
    train_here(spoiled, GUARD)
    assert len(events(run)) == 1
    assert list(losses(run).values()) == list(losses(train_here(clean)).values())


def test_sources_with_an_end_make_the_run_shorter(spoiled: Path) -> None:
    for changes in (("steps=null", "epochs=1"), ("steps=40", "data.sources.spoiled.epochs=1")):
        run = train_here(spoiled, GUARD, f"run={spoiled.parent / changes[0]}", *changes)
        assert max(losses(run)) == 33
        assert checkpoint.read_position(checkpoint.find(run)).step == 33


def test_without_a_checkpoint_from_before_the_run_goes_on(spoiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_here(spoiled, GUARD, "save_every=0")
    assert max(losses(run)) == 33
    assert "the run goes on as it is, no checkpoint is as old as step 21" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_spikes_too_often_stops(spoiled: Path) -> None:
    with pytest.raises(RunError, match=r"The guard has gone back 0 times, as often as guard.rewinds allows. Lower"):
        train_here(spoiled, "guard={window: 16, rewinds: 0}")
    assert checkpoint.read_position(checkpoint.find(spoiled.parent / "run")).step == 20
