"""A run that somebody else could have written into is not loaded.

To load a run is to believe it: ``config.yaml`` names code to run, a checkpoint the weights to go on with.
"""

from __future__ import annotations

from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.safety import writable_by_others
from launcher.errors import RunError
from launcher.rundir import RunDirectory

__all__ = ["TRUST", "refuse_shared_run"]

TRUST = "checkpoint.trust_shared_directory=true"
_SHOWN = 5


def refuse_shared_run(run: RunDirectory, trusted: bool, how_to_trust: str = TRUST) -> None:
    """Refuse to load from a run that another user could have changed.

    Looked at are the run's folder, its configurations, ``checkpoints`` and the checkpoints in it (their files are
    looked at when they are loaded). An access control list shows in the group's bits. The folders above are not
    looked at: who can write into those can put another folder in the run's place, but not one of ours.

    Args:
        run: an existing run.
        trusted: whether to load from it all the same.
        how_to_trust: what the message says to write for that.

    Raises:
        RunError: naming each place, and who can write there.
    """
    if trusted:
        return
    places = [run.path, *run.configs(), run.checkpoints]
    places += [checkpoint.path for checkpoint in CheckpointStore(run.checkpoints).candidates()]
    # A link and what it leads to: either decides what is loaded.
    places = [each for place in places if place.exists() for each in dict.fromkeys((place, place.resolve()))]
    open_to_others = [reason for place in places if (reason := writable_by_others(place))]
    if not open_to_others:
        return
    more = [f"  … and {len(open_to_others) - _SHOWN} more"] if len(open_to_others) > _SHOWN else []
    lines = [
        f"The run {run.path} is not loaded: another user can write into it, and what is loaded from it decides "
        "which code runs and with which weights.",
        *(f"  {reason}" for reason in open_to_others[:_SHOWN]),
        *more,
        f"If nobody has: chmod -R go-w {run.path} (or chown), or load it as it is: {how_to_trust}.",
    ]
    raise RunError("\n".join(lines))
