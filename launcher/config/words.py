"""OmegaConf's exceptions in plain words: the key, the value, the valid ones."""

from __future__ import annotations

import re

from omegaconf import DictConfig, MissingMandatoryValue
from omegaconf.errors import OmegaConfBaseException

from launcher.config.forms import own_form, verbatim
from launcher.config.nearest import nearest
from launcher.config.schema import ClusterConfig

__all__ = ["in_words", "shown"]


_NOT_A_NUMBER = re.compile(r"Value '(?P<value>.*)' of type '\w+' could not be converted to (?P<kind>Integer|Float)")
_KINDS = {"Integer": "whole number", "Float": "number"}


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
        add += verbatim(word) if parent._metadata.object_type is ClusterConfig else ""
        return f"There is no key {key!r}.{nearest(word, words)}{valid}{add}"
    if words_for_it := _wrong_value(key, reason):
        return words_for_it
    return f"{key}: {reason.rstrip('.')}." if key else reason


def _wrong_value(key: str, reason: str) -> str | None:
    """What is wrong with a value, and what it could be; None if the reason says that well enough."""
    if "is not a ListConfig" in reason:
        return f"{key} is a list: write {key}=[first,second], and a value with blanks or colons in quotes."
    if "Cannot assign str to Dict" in reason:
        return f"{key} is a mapping: write +{key}.NAME=VALUE for each of its keys."
    if number := _NOT_A_NUMBER.match(reason):
        value = number["value"]
        return f"{key}={value} is not a {_KINDS[number['kind']]}.{own_form(key, value)}"
    if truth := re.match(r"Value '(.*)' is not a valid bool", reason):
        return f"{key}={truth[1]} is neither true nor false."
    if text := re.match(r"Cannot convert 'list' to string: '(\[.*\])'", reason):
        inside = ",".join(part.strip(" '\"") for part in text[1].strip("[]").split(","))
        return f"{key}={text[1]} is a list, and must be one text. Several in one go in quotes: {key}=\\'{inside}\\'."
    return None
