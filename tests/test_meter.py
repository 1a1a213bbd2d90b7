"""Figures of a run against numbers worked out by hand, and the files that they are written to."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from mm.train.clock import clock_of
from mm.train.meter import (
    JsonLines,
    Meter,
    Peak,
    Progress,
    TensorBoard,
    datasheet_flops,
    device_peak,
    training_factors,
)

torch.set_num_threads(1)

PEAK = Peak(1e12, "a device that was made up", "mfu")
LOSSES = ("total", "modality/text", "modality/image", "source/captions")
FACTORS = {"encoders.image": 1, "adapters.image": 3, "encoders.speech": 3, "decoder": 2, "head": 3}


def meter(**options) -> Meter:
    return Meter(LOSSES, FACTORS, PEAK, **options)


def pair(weighted: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(weighted), torch.tensor(weight)


# ---------------------------------------------------------------------------------------------------------- losses


def test_a_loss_is_the_quotient_of_sums_over_micro_batches_and_steps():
    m = meter()
    m.add_losses({"total": pair(8.0, 2.0), "modality/text": pair(2.0, 1.0)})
    m.add_losses({"total": pair(4.0, 4.0)})
    m.end_step(1.0, 1e-3)
    m.add_losses({"total": pair(1.0, 0.5), "source/captions": pair(3.0, 4.0)})
    m.end_step(1.0, 1e-3)
    figures = m.report()

    assert figures["loss"] == 13.0 / 6.5
    assert figures["loss/modality/text"] == 2.0
    assert figures["loss/source/captions"] == 0.75


def test_a_loss_without_labels_is_left_out():
    m = meter()
    m.add_losses({"total": pair(0.0, 0.0)})
    m.end_step(1.0, 1e-3)
    assert not [name for name in m.report() if name.startswith("loss")]


def test_an_unknown_loss_is_refused_by_name():
    with pytest.raises(KeyError, match=r"source/unplanned.*source/captions"):
        meter().add_losses({"source/unplanned": pair(1.0, 1.0)})


def test_counting_a_loss_keeps_no_graph():
    m = meter()
    loss = torch.ones((), requires_grad=True) * 3
    m.add_losses({"total": (loss, torch.ones(()))})
    m.end_step(torch.ones(()), 1e-3)
    assert m.report()["loss"] == 3.0
    assert loss.grad_fn is not None


# ----------------------------------------------------------------------------------------------- tokens, time, norm


def test_fill_tokens_norm_and_rate():
    m = meter(tokens=1000)
    m.add_batch(90, 100, {})
    m.add_batch(60, 100, {})
    m.end_step(2.0, 1e-3)
    m.end_step(torch.tensor(4.0), 5e-4)
    figures = m.report()

    assert figures["fill"] == 0.75
    assert figures["tokens"] == 1150
    assert figures["gradient_norm"] == 3.0
    assert figures["learning_rate"] == 5e-4


def test_time_counts_phases_and_the_rest_but_not_what_is_paused():
    began = time.monotonic()
    m = meter()
    m.add_batch(100, 100, {})
    with m.timed("data"):
        time.sleep(0.06)
    with m.paused():
        time.sleep(0.5)
    for phase in ("forward", "backward", "forward", "backward"):
        with m.timed(phase):
            time.sleep(0.02)
    time.sleep(0.04)
    m.end_step(1.0, 1e-3)
    m.end_step(1.0, 1e-3)
    figures = m.report()

    seconds = 2 * figures["seconds_per_step"]
    assert 0.18 <= seconds <= time.monotonic() - began - 0.5
    spent = {name.removeprefix("time/"): seconds * share for name, share in figures.items() if name[:5] == "time/"}
    assert spent.keys() == {"data", "sync", "forward", "backward", "optimizer", "rest"}
    assert sum(spent.values()) == pytest.approx(seconds)
    assert spent["sync"] == spent["optimizer"] == 0
    for phase, slept in (("data", 0.06), ("forward", 0.04), ("backward", 0.04), ("rest", 0.04)):
        assert slept <= spent[phase] < seconds - 0.18 + slept + 1e-3, phase
    assert figures["tokens_per_second"] == pytest.approx(100 / (2 * figures["seconds_per_step"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
def test_kernels_count_for_the_phase_that_launched_them_and_not_for_what_waits_for_them():
    m = meter(clock=clock_of(torch.device("cuda")))
    left, right = torch.ones(2, 8192, 8192, device="cuda").unbind()
    with m.timed("forward"):
        for _ in range(20):
            torch.mm(left, right)
    with m.timed("optimizer"):
        torch.cuda.synchronize()
    m.end_step(1.0, 1e-3)
    figures = m.report()
    assert figures["time/forward"] > 20 * figures["time/optimizer"]


def test_a_report_starts_afresh_and_keeps_the_tokens():
    m = meter()
    m.add_batch(10, 10, {"decoder": 1.0})
    m.add_losses({"total": pair(5.0, 1.0)})
    m.end_step(9.0, 1e-3)
    m.report()
    m.add_batch(5, 10, {"decoder": 1.0})
    m.add_losses({"total": pair(1.0, 1.0)})
    m.end_step(1.0, 1e-3)
    figures = m.report()

    assert (figures["loss"], figures["gradient_norm"], figures["fill"], figures["tokens"]) == (1.0, 1.0, 0.5, 15)


def test_a_report_without_a_step_is_an_error():
    with pytest.raises(ValueError, match="at least one step"):
        meter().report()


def test_one_reduction_makes_the_figures_those_of_all_processes():
    """Two processes that are alike: losses, fill and time stay, sums of tokens and FLOPs double."""
    calls = []

    def two_processes_alike(numbers: list[float]) -> list[float]:
        calls.append(numbers)
        return [2 * number for number in numbers]

    alone, together = meter(), meter(reduce=two_processes_alike)
    for m in (alone, together):
        m.add_batch(30, 40, {"decoder": 1e6})
        m.add_losses({"total": pair(6.0, 2.0)})
        with m.timed("data"):
            time.sleep(0.01)
        m.end_step(0.5, 1e-3)
    one, two = alone.report(), together.report()

    assert len(calls) == 1
    for name in ("loss", "fill", "gradient_norm", "learning_rate"):
        assert one[name] == two[name]
    assert (one["tokens"], two["tokens"]) == (30, 60)
    assert two["tokens_per_second"] == pytest.approx(60 / two["seconds_per_step"])
    assert two["flops_per_second"] == pytest.approx(2 * 2e6 / two["seconds_per_step"])
    assert two["mfu"] == pytest.approx(2e6 / two["seconds_per_step"] / PEAK.flops)
    assert 0 < two["time/data"] <= 1


# ----------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_count_forward_and_backward_and_are_shared_out_by_part():
    m = meter()
    m.add_batch(1, 1, {"encoders.image": 10.0, "encoders.speech": 10.0, "adapters.image": 2.0, "decoder": 7.0})
    m.add_batch(1, 1, {"decoder": 5.0, "head": 10.0})
    m.end_step(1.0, 1e-3)
    figures = m.report()

    total = 1 * 10 + 3 * 10 + 3 * 2 + 2 * 12 + 3 * 10
    assert figures["flops/encoders"] == pytest.approx(40 / total)
    assert figures["flops/adapters"] == pytest.approx(6 / total)
    assert figures["flops/decoder"] == pytest.approx(24 / total)
    assert figures["flops/head"] == pytest.approx(30 / total)
    assert figures["flops_per_second"] == pytest.approx(total / figures["seconds_per_step"])
    assert figures["mfu"] == pytest.approx(figures["flops_per_second"] / PEAK.flops)


@pytest.mark.parametrize(
    ("encoder", "adapter", "decoder", "head", "factors"),
    [
        (True, True, True, True, (3, 3, 3, 3)),
        (False, True, True, True, (1, 3, 3, 3)),
        (False, True, False, False, (1, 3, 2, 2)),
        (True, False, False, False, (3, 2, 2, 2)),
        (False, False, True, False, (1, 1, 3, 2)),
        (False, False, False, True, (1, 1, 1, 3)),
        (False, False, False, False, (1, 1, 1, 1)),
    ],
)
def test_factors_of_what_trains_what_passes_gradients_on_and_what_does_neither(
    encoder, adapter, decoder, head, factors
):
    trained = {"encoders.image": encoder, "adapters.image": adapter, "decoder": decoder, "head": head}
    assert tuple(training_factors(trained).values()) == factors


def test_an_adapter_passes_gradients_on_to_its_own_encoder_only():
    trained = {
        "encoders.image": True,
        "adapters.image": False,
        "encoders.speech": False,
        "adapters.speech": False,
        "decoder": False,
    }
    factors = training_factors(trained)
    assert factors["adapters.image"] == 2
    assert factors["adapters.speech"] == 1
    assert factors["decoder"] == 2


@pytest.mark.parametrize(("first_trained", "second_trained"), [(True, True), (True, False), (False, False)])
def test_the_factor_is_what_autograd_computes_for_a_layer_behind_another(first_trained, second_trained):
    first, second = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    first.requires_grad_(first_trained)
    second.requires_grad_(second_trained)

    def flops(*layers: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            out = torch.nn.Sequential(*layers)(torch.ones(4, 8)).sum()
            if out.requires_grad:
                out.backward()
        return counter.get_total_flops()

    factors = training_factors({"encoders.image": first_trained, "decoder": second_trained})
    assert flops(first, second) - flops(first) == factors["decoder"] * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peaks_are_found_by_the_driver_s_names(name, flops):
    assert datasheet_flops(name) == flops


def test_a_measured_peak_is_that_of_a_cpu_and_is_called_so():
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert 1e9 < peak.flops < 1e14  # from an emulated core to a socket of tomorrow, in FLOP/s
    assert peak.figure == "mfu_of_measured"
    assert peak.origin == "cpu, measured by a float32 product"


# ----------------------------------------------------------------------------------------------------------- files


def lines(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_has_a_line_per_step_at_once_and_null_for_what_is_not_finite(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", first_step=1)
    writer.write(1, {"loss": 2.5, "gradient_norm": math.inf})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "gradient_norm": None}]
    writer.write(2, {"loss": math.nan})
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": None}
    writer.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, first_step=1)
    for step in range(1, 6):
        first.write(step, {"loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here

    second = JsonLines(path, first_step=4)
    for step in range(4, 7):
        second.write(step, {"loss": 2.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_a_half_written_line_is_cut_even_if_its_step_is_not_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1')
    JsonLines(path, first_step=10).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_damaged_file_is_named_with_its_line_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        JsonLines(path, first_step=2)
    assert path.read_text().endswith('{"step": 3}\n')


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, loss in ((1, 1.0), (3, 2.0)):
        writer = TensorBoard(tmp_path, first_step)
        for step in range(first_step, 5):
            writer.write(step, {"loss": loss})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_the_terminal_shows_the_figures_that_a_person_watches(tmp_path):
    with (tmp_path / "out").open("w") as out:
        progress = Progress(total=2000, done=0, console=Console(file=out, width=300))
        progress.advance()
        progress.write(120, {"loss": 3.21401, "fill": 0.981, "tokens_per_second": 12345.6, "mfu_of_measured": 0.5})
        progress.close()
    assert (tmp_path / "out").read_text() == (
        "step  120/2000  loss 3.2140  12,346 tok/s  fill 98.1 %  50 % of a measured product\n"
    )


def test_a_terminal_has_a_bar_with_the_time_that_is_left(tmp_path):
    with (tmp_path / "out").open("w") as out:
        progress = Progress(total=10, done=4, console=Console(file=out, width=100, force_terminal=True))
        progress.advance()
        progress.close()
    text = (tmp_path / "out").read_text()
    assert "5/10" in text
    assert "left" in text
