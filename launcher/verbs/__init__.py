"""What ``launch VERB`` does besides launching: one module for each verb, with ``act(words) -> exit code``.

Importing this costs nothing; a verb's module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from launcher.config.nearest import nearest
from launcher.errors import RequestError

__all__ = ["VERBS", "act", "is_word"]

VERBS = {
    "ls": "launch ls",
    "status": "launch status RUN",
    "logs": "launch logs RUN [-f]",
    "cancel": "launch cancel RUN [--save [--no-requeue]]",
    "check": "launch check +experiment=NAME [key=value …]",
    "resume": "launch resume RUN [key=value …]",
    "export": "launch export RUN out.safetensors",
}
"""How each is written. ``resume`` and ``check`` begin as a launch does, and are the command's own."""


def is_word(argument: str) -> bool:
    """Whether an argument is a plain word: no flag, no override."""
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


def act(arguments: Sequence[str]) -> int:
    """Do what the verb at the beginning of a command line says; returns the exit code.

    Raises:
        RequestError: there is no such verb.
    """
    verb, *words = arguments
    if verb not in VERBS:
        written = "; ".join(VERBS.values())
        meant = nearest(verb, VERBS) or f" An experiment is chosen by launch +experiment={verb}."
        raise RequestError(f"{verb!r} is not a verb.{meant} Verbs: {written}.")
    module = importlib.import_module(f"{__name__}.{verb}")
    code: int = module.act(words)
    return code
