"""The valid word that a misspelled one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(word: str, words: Iterable[str]) -> str:
    """`` Did you mean 'lr'?`` for a misspelled word, else an empty text."""
    spelled = {valid.lower(): valid for valid in words}
    matches = difflib.get_close_matches(word.lower(), list(spelled), n=1, cutoff=0.6)
    return f" Did you mean {spelled[matches[0]]!r}?" if matches else ""
