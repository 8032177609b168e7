"""Whether a failed attempt is followed by another: not if that would only fail again."""

from __future__ import annotations

from launcher.checkpoint import CheckpointStore
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED
from launcher.rundir import RunDirectory
from launcher.rundir.failures import Failure
from launcher.rundir.records import read_json_lines

__all__ = ["Restarts", "lost_in_a_row", "newest_step", "where"]


class Restarts:
    """The restarts of one launch, counted anew from each newly published checkpoint.

    Without checkpoints nothing outlasts a failure, so nothing counts as progress.

    Args:
        run: the run's directory.
        config: the run's.
        already: attempts in a row that earlier turns of the same job have lost without progress.
    """

    def __init__(self, run: RunDirectory, config: RunConfig, already: int = 0) -> None:
        self._run = run
        self._config = config
        self._allowed = config.cluster.max_restarts
        self._since_progress = already
        self._is_first = already == 0
        self.newest_step = newest_step(run, config)
        """Of the newest checkpoint at the last failure, or when the launch began; None without one."""

    def refusal(self, failure: Failure, reported_a_step: bool, stop_requested: bool) -> str | None:
        """Why the run ends with this failure, in words (none where they would say nothing); None: restart it.

        Args:
            failure: what ended the attempt.
            reported_a_step: whether the attempt has.
            stop_requested: whether the launch was asked to stop.
        """
        before, self.newest_step = self.newest_step, newest_step(self._run, self._config)
        never_stepped = not reported_a_step and (failure.step or 0) <= (before or 0)
        is_first, self._is_first = self._is_first, False
        if (self.newest_step or -1) > (before or -1):
            self._since_progress = 0
        if self._allowed == 0 or failure.exit_code != EXIT_FAILED or stop_requested:
            return ""
        if is_first and never_stepped:
            return "not restarted: it failed before its first step"
        if self._since_progress >= self._allowed:
            progress = "no checkpoint" if self.newest_step is None else f"none newer than step {self.newest_step}"
            return (
                f"not restarted: {self._since_progress} restart(s) have published {progress}, and "
                f"cluster.max_restarts={self._allowed}"
            )
        self._since_progress += 1
        return None


def newest_step(run: RunDirectory, config: RunConfig) -> int | None:
    """Of the newest checkpoint that the next attempt would look at; None if it begins anew."""
    return CheckpointStore(run.checkpoints).newest_step() if config.checkpoint.enabled else None


def lost_in_a_row(run: RunDirectory) -> int:
    """The attempts, up to the last, after which there was no newer checkpoint than before them."""
    ends = [line.get("checkpoint") for line in read_json_lines(run.attempts)]
    count = 0
    for before, after in zip([None, *ends][::-1][1:], ends[::-1], strict=True):
        if (after or -1) > (before or -1):
            break
        count += 1
    return count


def where(step: int | None) -> str:
    """What an attempt that looks at the checkpoint of ``step`` begins with, in words."""
    return "from the beginning: there is no checkpoint" if step is None else f"from the checkpoint of step {step}"
