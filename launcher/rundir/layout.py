"""Every file name in a run directory, and how a new directory gets its name. No other module spells one."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigurationError

__all__ = ["RunDirectory"]

_ONLY_OWNER_WRITES = 0o755


@dataclass(frozen=True)
class RunDirectory:
    """The paths in ``runs/<name>/<id>/``, ``<id>`` being ``YYYYmmdd-HHMMSS-<4 hex>`` in local time."""

    path: Path

    @classmethod
    def create(cls, runs_root: Path, name: str, run_dir: str | None = None) -> RunDirectory:
        """Make a directory that did not exist before; two calls in one second get two directories.

        Args:
            runs_root: the folder of all runs.
            name: the run's name; the directory is made in ``runs_root / name``.
            run_dir: the directory itself, if its place was chosen; it must be new or empty.

        Raises:
            ConfigurationError: the directory cannot be made, or ``run_dir`` holds something.
        """
        try:
            if run_dir is not None:
                return cls._create_at(Path(run_dir).absolute())
            parent = runs_root.absolute() / name
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
                path = parent / f"{stamp}-{secrets.token_hex(2)}"
                try:
                    path.mkdir(mode=_ONLY_OWNER_WRITES)
                except FileExistsError:
                    continue
                return cls(path)
        except OSError as error:
            place = f"run_dir={run_dir}" if run_dir is not None else f"runs_root={runs_root}"
            raise ConfigurationError(
                f"{place}: no run directory can be made there ({error.strerror}: {error.filename}). "
                "Choose a folder that you can write to: runs_root=PATH."
            ) from error

    @classmethod
    def _create_at(cls, path: Path) -> RunDirectory:
        path.mkdir(mode=_ONLY_OWNER_WRITES, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigurationError(f"run_dir={path} is not empty: name a new folder, or leave run_dir out.")
        return cls(path)

    @property
    def id(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration that every worker of every attempt loads; written once."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Where the run comes from: command line, commit, versions, hosts."""
        return self.path / "provenance.json"

    @property
    def status(self) -> Path:
        """The run's state, see ``status.Status``."""
        return self.path / "status.json"

    @property
    def attempts(self) -> Path:
        """One line per attempt that has ended."""
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per event, over all attempts."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, see ``checkpoint.CheckpointStore``."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """What a finished run came to."""
        return self.path / "result.json"

    def attempt_logs(self, attempt: int) -> Path:
        """The folder of one attempt's logs."""
        return self.path / "logs" / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """stdout and stderr of one rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    def rank_failure(self, attempt: int, rank: int) -> Path:
        """Why a rank failed, see ``failures.Failure``; absent if it did not."""
        return self.attempt_logs(attempt) / f"rank-{rank}.failure.json"

    def agent_log(self, attempt: int, node_rank: int) -> Path:
        """What torch's elastic agent on one node had to say."""
        return self.attempt_logs(attempt) / f"agent-{node_rank}.log"
