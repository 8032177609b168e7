"""What can go wrong, and the exit code for each."""

from __future__ import annotations

__all__ = ["EXIT_FAILED", "EXIT_IMPOSSIBLE", "EXIT_REQUEST", "ClusterError", "ImpossibleHereError", "RequestError"]

EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_IMPOSSIBLE = 3


class ClusterError(Exception):
    """A step failed that should not have."""

    exit_code = EXIT_FAILED


class RequestError(ClusterError):
    """The command does not fit: no such node, no cluster there."""

    exit_code = EXIT_REQUEST


class ImpossibleHereError(ClusterError):
    """This machine cannot have such a cluster: not root, not Linux, no packages."""

    exit_code = EXIT_IMPOSSIBLE
