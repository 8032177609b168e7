"""What a run tells: lines of metrics with fixed fields, and a console in three styles."""

from __future__ import annotations

import io
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.observe import Reporter, RunFacts, StepTiming, build_reporter
from launcher.observe.console import Console
from launcher.observe.terminal import Terminal
from launcher.rundir import RunDirectory, State, Status
from launcher.training.outcome import StepNumbers
from tests.unit.configs import good_config

TRAIN_FIELDS = {
    *("kind", "attempt", "step", "applied_steps", "samples", "epoch", "loss", "grad_norm", "loss_scale", "overflow"),
    *("lr", "step_seconds", "data_seconds", "samples_per_second", "memory_gib", "wire_bytes", "time"),
}
OVERFLOW: dict[str, Any] = {
    "loss_scale": 4.0,
    "loss_is_finite": True,
    "ranks": [1],
    "hosts": ["node"],
    "before_wire": True,
    "num_parameters": 12,
    "parameters": ["layer.weight", "layer.bias"],
}
RESULT = {"step": 30, "loss": 0.5, "validation": {"loss": 0.25}, "parameters_digest": "abc", "seconds": 2.0}


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def numbers(step: int, **changes: Any) -> StepNumbers:
    values: dict[str, Any] = {
        "step": step,
        "loss": 0.5,
        "grad_norm": 2.0,
        "loss_scale": 4.0,
        "overflow": False,
        "rate_factor": 0.5,
        "applied_steps": step - 1,
        "stop": False,
        "wire_bytes": 10,
        "compression_error": None,
        "digests": (1.0,),
        "origins": (),
    }
    return StepNumbers(**{**values, **changes})


def facts(style: str = "plain", log_every: int = 10) -> RunFacts:
    config = good_config(name="mine", tracking__console=style, train__log_every=log_every, optimizer__lr=0.1)
    return RunFacts(config, 30, 64, 128, torch.device("cpu"), hosts=("here",))


def reporter(folder: Path, style: str = "plain", stream: io.StringIO | None = None, log_every: int = 10) -> Reporter:
    terminal = Terminal(io.StringIO() if stream is None else stream)
    return build_reporter(RunDirectory(folder), facts(style, log_every), terminal, Status(State.running, attempt=2))


def written(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    lines = RunDirectory(folder).metrics.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_training_line_has_exactly_the_documented_fields(tmp_path: Path) -> None:
    with closing(reporter(tmp_path)) as report:
        report.step(numbers(3), StepTiming(step_seconds=0.5, data_seconds=0.1))
    (line,) = written(tmp_path)
    assert set(line) == TRAIN_FIELDS
    assert (line["kind"], line["attempt"], line["step"], line["applied_steps"]) == ("train", 2, 3, 2)
    assert (line["samples"], line["epoch"], line["samples_per_second"]) == (192, 1.5, 128.0)
    assert (line["loss"], line["grad_norm"], line["loss_scale"], line["overflow"]) == (0.5, 2.0, 4.0, False)
    assert (line["lr"], line["step_seconds"], line["data_seconds"]) == (0.05, 0.5, 0.1)
    assert line["memory_gib"] > 0


def test_validation_and_events_have_lines_of_their_own(tmp_path: Path) -> None:
    with closing(reporter(tmp_path)) as report:
        report.validation(5, {"loss": 1.0, "accuracy": 0.5})
        report.event("stop", step=6, why="asked")
    validation, event = written(tmp_path)
    assert {**validation, "time": 0} == {
        "kind": "validation",
        "attempt": 2,
        "step": 5,
        "loss": 1.0,
        "accuracy": 0.5,
        "time": 0,
    }
    assert {**event, "time": 0} == {
        "kind": "event",
        "attempt": 2,
        "event": "stop",
        "step": 6,
        "why": "asked",
        "time": 0,
    }


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    with closing(reporter(tmp_path)) as report:
        report.step(numbers(1, loss=math.nan, grad_norm=math.inf, overflow=True), StepTiming(1.0, 0.0))
        report.validation(1, {"loss": math.nan})
    train, validation = written(tmp_path)
    assert train["loss"] is None
    assert train["grad_norm"] is None
    assert validation["loss"] is None


def test_lines_of_a_later_attempt_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        with closing(reporter(tmp_path)) as report:
            report.step(numbers(step), StepTiming(1.0, 0.0))
    assert [line["step"] for line in written(tmp_path)] == [1, 2]


def test_the_status_follows_the_steps(tmp_path: Path) -> None:
    with closing(reporter(tmp_path)) as report:
        report.step(numbers(3), StepTiming(1.0, 0.0))
    status = Status.read(RunDirectory(tmp_path).status)
    assert (status.state, status.step) == (State.running, 3)


def test_what_a_shorter_run_had_come_to_is_there_until_the_first_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.result.write_text("{}")
    report = reporter(tmp_path)
    report.event("resume", step=0, path="p", passed_over=[], notes=[])
    assert run.result.exists()
    report.step(numbers(1), StepTiming(1.0, 0.0))
    assert not run.result.exists()
    report.close()


def test_a_rank_without_the_terminal_is_silent(tmp_path: Path) -> None:
    silent = build_reporter(RunDirectory(tmp_path), facts(), None, Status(State.running))
    silent.step(numbers(1), StepTiming(1.0, 0.0))
    silent.validation(1, {})
    silent.event("stop", step=1)
    silent.finish(RESULT)
    silent.close()
    assert list(tmp_path.iterdir()) == []


def told(folder: Path, style: str, stream: io.StringIO) -> str:
    with closing(reporter(folder, style, stream)) as report:
        for step in range(1, 31):
            report.step(numbers(step, overflow=step == 20), StepTiming(1.0, 0.0))
        report.event("overflow", step=20, **OVERFLOW)
        report.validation(30, {"accuracy": 0.75})
        report.finish(RESULT)
    return stream.getvalue()


@pytest.mark.parametrize("style", ["plain", "auto"])
def test_plain_lines_come_first_last_and_every_so_often(tmp_path: Path, style: str) -> None:
    lines = told(tmp_path, style, io.StringIO()).splitlines()
    steps = [int(line.split()[1].partition("/")[0]) for line in lines if "grad norm" in line]
    assert steps == [1, 10, 20, 30]
    assert [("skipped: overflow" in line) for line in lines if "grad norm" in line] == [False, False, True, False]
    assert "loss 0.5000  scale 4  64 samples/s  grad norm 2  lr 0.05" in lines[0]
    assert lines[-1] == "parameters: abc"
    for words in ("finished: step 30", "training loss 0.5000", "loss 0.2500", "2.0 s"):
        assert words in lines[-2]
    assert "validation: accuracy 0.7500" in lines[-3]


def test_an_overflow_is_told_with_its_rank_parameters_and_scale(tmp_path: Path) -> None:
    line = next(line for line in told(tmp_path, "plain", io.StringIO()).splitlines() if "overflow:" in line)
    assert "rank 1 on node; 12 parameter(s): layer.weight, layer.bias, …; loss scale 4" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": [], "hosts": [], "before_wire": False}, "in the sum over the ranks"),
        ({"ranks": [], "hosts": [], "before_wire": None}, "some rank"),
        ({"loss_is_finite": False}, "the loss is not finite"),
    ],
)
def test_an_overflow_says_where_it_began(changes: dict[str, Any], words: str) -> None:
    stream = io.StringIO()
    Console(stream, "plain", "mine", 30, 10).event("overflow", 3, {**OVERFLOW, **changes})
    assert words in stream.getvalue()


@pytest.mark.parametrize(("style", "stream"), [("live", io.StringIO), ("auto", Screen)])
def test_a_live_line_shows_progress_and_keeps_what_is_said_above_it(tmp_path: Path, style: str, stream: Any) -> None:
    text = told(tmp_path, style, stream())
    assert "30/30" in text
    assert "scale 4" in text
    assert "validation: accuracy 0.7500" in text
    assert "parameters: abc" in text
    assert "grad norm" not in text


def test_off_says_nothing_and_still_writes_metrics(tmp_path: Path) -> None:
    assert told(tmp_path, "off", io.StringIO()) == ""
    assert len(written(tmp_path)) == 32


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    for style in ("live", "plain"):
        report = reporter(tmp_path, style)
        report.close()
        report.close()


def test_a_terminal_that_has_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    terminal = Terminal(Gone())
    assert terminal.write("text") == 4
    terminal.show("a line")
