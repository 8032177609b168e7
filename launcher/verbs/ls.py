"""``launch ls``: the runs that there are, the newest last, and what each is doing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_FINISHED
from launcher.rundir.find import all_runs
from launcher.rundir.sweeps import distinctions
from launcher.verbs.view import View, views
from launcher.verbs.words import VerbParser, ago

__all__ = ["act"]

_REASON_WIDTH = 60


def act(words: Sequence[str]) -> int:
    """List the runs; returns the exit code."""
    options = _parser().parse_args(list(words))
    seen = views(all_runs(Path(options.runs_root))[-options.number if options.number else None :])
    differs = distinctions([view.run for view in seen])
    if options.json:
        print(json.dumps([{**_as_json(view), "sweep": differs.get(view.run.path)} for view in seen], indent=2))
    elif not seen:
        print(f"there are no runs below {options.runs_root}; another folder: launch ls --runs-root FOLDER")
    else:
        rows = [("RUN", "STATE", "STEP", "ATTEMPT", "CHANGED", "WHERE", ""), *map(_row, seen)]
        if any(differs.values()):
            words = ["SWEEP", *(differs.get(view.run.path, "") for view in seen)]
            rows = [(*row[:1], word, *row[1:]) for row, word in zip(rows, words, strict=True)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return EXIT_FINISHED


def _parser() -> VerbParser:
    parser = VerbParser("ls", "List the runs, the newest last, and what each is doing.", takes_run=False)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("-n", "--number", type=int, default=0, metavar="N", help="only the N that were begun last")
    return parser


def _row(view: View) -> tuple[str, ...]:
    status = view.status
    if status is None:
        return (view.name, view.condition, "", "", "", "", "")
    where = f"job {status.job_id}" if status.job_id is not None else ", ".join(status.hosts)
    job = view.job if view.job is not None and view.job.is_alive else None
    waiting = f"{job.state}: {job.reason or ''}".rstrip(": ") if job is not None and job.state != "RUNNING" else ""
    reason = "; ".join(filter(None, (waiting, view.explanation)))
    first = reason.splitlines()[0] if reason else ""
    shown = first if len(first) <= _REASON_WIDTH else f"{first[: _REASON_WIDTH - 1]}…"
    return (view.name, view.condition, str(status.step), str(status.attempt), ago(status.updated), where, shown)


def _as_json(view: View) -> dict[str, object]:
    from launcher.verbs.status import as_json

    return as_json(view)
