"""What is wrong with a checkpoint: damage, which stays, or a state of things that may pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from launcher.checkpoint.manifest import DamagedError
from launcher.errors import DamagedCheckpointError, RequestError

__all__ = ["NotNowError", "Problem", "judging", "looking_into"]


class NotNowError(DamagedError):
    """Nothing is known to be wrong with the content; it must not, or cannot, be loaded as things are."""


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint must not be loaded."""

    reason: str
    is_damage: bool
    """Whether the content is wrong, and stays so. Not so for permissions that a user can mend, or a server's error."""

    def __str__(self) -> str:
        return self.reason


@dataclass
class _Verdict:
    problem: Problem | None = None


@contextmanager
def judging() -> Iterator[_Verdict]:
    """Turns what is raised inside, by a look at a checkpoint, into a problem."""
    verdict = _Verdict()
    try:
        yield verdict
    except DamagedError as damage:
        verdict.problem = Problem(str(damage), is_damage=not isinstance(damage, NotNowError))
    except DamagedCheckpointError as damage:
        verdict.problem = Problem(damage.reason, is_damage=True)
    except OSError as error:
        verdict.problem = Problem(f"it cannot be read ({error.strerror}: {error.filename})", is_damage=False)


@contextmanager
def looking_into(path: object, name: str) -> Iterator[None]:
    """Whatever fails inside is what a file of a checkpoint holds: nothing of the user's is called or compared there.

    Args:
        path: the checkpoint.
        name: of the file.

    Raises:
        DamagedCheckpointError: in place of any error but a request's, the system's, and a lack of memory.
    """
    try:
        yield
    except (RequestError, OSError, MemoryError):
        raise
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        raise DamagedCheckpointError(
            path, f"{name} does not hold what belongs there ({type(error).__name__}: {text})"
        ) from error
