"""What a person sees: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from launcher.observe.terminal import Terminal

__all__ = ["Console"]


class _Numbers(ProgressColumn):
    """Loss, loss scale and speed of the last step."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("numbers", ""))


def _overflow(details: dict[str, Any]) -> str:
    """Where an overflow came from, in one line."""
    ranks = ", ".join(f"rank {rank} on {host}" for rank, host in zip(details["ranks"], details["hosts"], strict=True))
    where = ranks or ("in the sum over the ranks" if details["before_wire"] is False else "some rank")
    count, shown = details["num_parameters"], ", ".join(details["parameters"])
    more = "" if count <= len(details["parameters"]) else ", …"
    cause = "" if details["loss_is_finite"] else "the loss is not finite; "
    return f"skipped; {cause}{where}; {count} parameter(s): {shown}{more}; loss scale {details['loss_scale']:g}"


def _checkpoint(details: dict[str, Any]) -> str:
    """What was written, how long it took, and what training has felt of it."""
    size = f"{details['bytes'] / 1e6:.1f} MB in {details['seconds']:.1f} s"
    return f"{details['path']}  {size}, training stood still for {details['stall_seconds']:.2f} s"


def _resume(details: dict[str, Any]) -> str:
    """Where a run goes on, and whatever is not as it was."""
    over = [f"passed over {reason}" for reason in details["passed_over"]]
    return "; ".join([f"from {details['path']}", *over, *details["notes"]])


def _checkpoint_failed(details: dict[str, Any]) -> str:
    """Who could not write what."""
    return "; ".join(details["problems"])


_TOLD = {
    "overflow": _overflow,
    "checkpoint": _checkpoint,
    "checkpoint_failed": _checkpoint_failed,
    "resume": _resume,
}
"""How an event's details are put; others are listed."""


class Console:
    """Rank 0's view of a run.

    Args:
        stream: where to write; a terminal gets a live line under ``style`` auto.
        style: auto, live, plain or off.
        name: of the run.
        total_steps: of the run.
        log_every: steps between two plain lines.
    """

    def __init__(self, stream: TextIO | Terminal, style: str, name: str, total_steps: int, log_every: int) -> None:
        self._stream = stream
        self._style = ("live" if stream.isatty() else "plain") if style == "auto" else style
        self._total_steps = total_steps
        self._log_every = log_every
        self._width = len(str(total_steps))
        self._progress: Progress | None = None
        if self._style == "live":
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                _Numbers(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=RichConsole(file=cast("TextIO", stream), force_terminal=True),
                refresh_per_second=8,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(name, total=total_steps)
            self._progress.start()
            if isinstance(stream, Terminal):
                stream.show = self.say

    def step(self, line: dict[str, Any]) -> None:
        """A step's line of metrics.jsonl."""
        step = line["step"]
        numbers = f"loss {line['loss']:.4f}  scale {line['loss_scale']:g}  {line['samples_per_second']:.0f} samples/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step % self._log_every == 0 or step in (1, self._total_steps):
            skipped = "  skipped: overflow" if line["overflow"] else ""
            self.say(
                f"step {step:>{self._width}}/{self._total_steps}  {numbers}  grad norm {line['grad_norm']:.3g}  "
                f"lr {line['lr']:.3g}{skipped}"
            )

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """The validation metrics after a step."""
        listed = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step:>{self._width}}/{self._total_steps}  validation: {listed}")

    def event(self, event: str, step: int, details: dict[str, Any]) -> None:
        """Anything else."""
        listed = _TOLD[event](details) if event in _TOLD else "  ".join(f"{k} {v}" for k, v in details.items())
        name = event.replace("_", " ")
        self.say(f"step {step:>{self._width}}/{self._total_steps}  {name}{': ' if listed else ''}{listed}")

    def finish(self, result: dict[str, Any]) -> None:
        """What the run came to."""
        self.close()
        metrics = "".join(f"  {name} {value:.4f}" for name, value in (result["validation"] or {}).items())
        self.say(
            f"finished: step {result['step']}  training loss {result['loss']:.4f}"
            f"{'  validation:' + metrics if metrics else ''}  {result['seconds']:.1f} s"
        )
        self.say(f"parameters: {result['parameters_digest']}")

    def say(self, text: str) -> None:
        """One line, above the live one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._style != "off":
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the live line as it is and go to the next."""
        if self._progress is not None:
            self._progress.stop()
