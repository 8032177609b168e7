"""OmegaConf's exceptions in plain words: the key, the value, the valid ones."""

from __future__ import annotations

import re

from omegaconf import DictConfig, MissingMandatoryValue
from omegaconf.errors import OmegaConfBaseException

from launcher.config.nearest import nearest

__all__ = ["in_words", "shown"]


def shown(value: object) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value)


def in_words(error: BaseException) -> str:
    """One line, or what the exception says itself if it is not OmegaConf's."""
    if not isinstance(error, OmegaConfBaseException):
        return str(error).strip()
    key = error.full_key or ""
    reason = (error.msg or str(error)).splitlines()[0].strip()
    if isinstance(error, MissingMandatoryValue):
        name = key or re.sub(r"^Missing mandatory value: ", "", reason)
        return f"{name} has no value: give one ({name}=…)."
    reason = reason.replace("is incompatible with type hint 'Union[int, str]'", "is neither a whole number nor a text")
    parent = error.parent_node
    if re.search(r"\bnot in\b", reason) and isinstance(parent, DictConfig):
        word = key.rpartition(".")[2]
        words = [str(name) for name in parent if name != "hydra"]
        valid = f" Valid: {', '.join(sorted(words))}." if words else ""
        add = "" if parent._metadata.object_type not in (dict, None) else f" To add a new key: +{key}=…"
        return f"There is no key {key!r}.{nearest(word, words)}{valid}{add}"
    if "is not a ListConfig" in reason:
        return f"{key} is a list: write {key}=[first,second], and a value with blanks or colons in quotes."
    return f"{key}: {reason.rstrip('.')}." if key else reason
