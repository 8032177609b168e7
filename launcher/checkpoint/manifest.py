"""``manifest.json``: what a checkpoint holds, and the digest of every file in it.

The file is exactly what ``render`` makes of its content, its own digest included, so that a reader notices a change
of any byte. It is JSON: loss scale, cursor and counters can be read without T-minus.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = [
    "MANIFEST",
    "MAXIMUM_BYTES",
    "DamagedError",
    "FileRecord",
    "Manifest",
    "is_count",
    "is_number",
    "is_safe_name",
]

MANIFEST = "manifest.json"
SCHEMA = 1
_DIGEST_KEY = "sha256_of_this_file"
MAXIMUM_BYTES = 256 * 2**20
"""No manifest is larger."""
_SHOWN = 60


class DamagedError(Exception):
    """A checkpoint, or a file of one, cannot be trusted; the message is the reason, without the checkpoint's name."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int
    """Optimizer steps attempted."""
    applied_steps: int
    """Of these, those that were not skipped."""
    samples: int
    """The data cursor: samples used so far, over all ranks; a position in the endless sequence of samples."""
    world_size: int
    strategy: str
    dtype: str
    """What autocast computed in."""
    config_digest: str
    """SHA-256 of the run's configuration."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """Every counter of the loss scale; empty where there is none."""
    loss: float | None = None
    """Of the last step; None if it was not finite."""
    validation: dict[str, Any] | None = None
    """The metrics of the validation after this very step, if there was one."""
    best: float | None = None
    """The best value so far of the metric by which the best checkpoints are kept; ``state`` says which that is."""
    state: dict[str, Any] = field(default_factory=dict)
    """What else the training loop and its optimizer want to know again."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names of parameters: alias to the name that the value is saved under."""
    created: float = 0.0
    """Seconds since 1970."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """By name, all but the manifest itself."""

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(record.size for record in self.files.values())

    def render(self) -> bytes:
        """The file's bytes."""
        content = {"schema": SCHEMA, **asdict(self)}
        digest = hashlib.sha256(_canonical(content)).hexdigest()
        return _canonical({**content, _DIGEST_KEY: digest})

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The inverse of ``render``.

        Raises:
            DamagedError: the bytes are not exactly what ``render`` makes.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{MANIFEST} is not JSON ({error})") from error
        if not isinstance(content, dict) or not isinstance(content.get(_DIGEST_KEY), str):
            raise DamagedError(f"{MANIFEST} has no digest of its own")
        digest = content.pop(_DIGEST_KEY)
        whole = _canonical({**content, _DIGEST_KEY: digest})
        if hashlib.sha256(_canonical(content)).hexdigest() != digest or whole != data:
            raise DamagedError(f"{MANIFEST} is not what was written (its digest differs)")
        if content.pop("schema", None) != SCHEMA:
            raise DamagedError(f"{MANIFEST} is of another version of T-minus: its schema is not {SCHEMA}")
        return cls._checked(content)

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> Manifest:
        """From a dict that anybody may have written."""
        expected = {one.name for one in fields(cls)}
        if set(content) != expected:
            raise DamagedError(f"{MANIFEST} lacks or adds entries: {sorted(set(content) ^ expected)}")
        for name, (fits, what) in _FIELDS.items():
            if not fits(content[name]):
                raise DamagedError(f"{MANIFEST}: {name}={_shown(content[name])} is not {what}")
        files = content["files"]
        records = {}
        for name, record in files.items():
            if not is_safe_name(name):
                raise DamagedError(f"{MANIFEST} names a file that is not in the checkpoint's own folder: {name!r}")
            if not isinstance(record, dict) or set(record) != {"size", "sha256"} or not is_count(record["size"]):
                raise DamagedError(f"{MANIFEST}: {name!r} has no size and digest")
            records[name] = FileRecord(record["size"], str(record["sha256"]))
        return cls(**{**content, "files": records})


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number that a tensor of 64 bits holds, and not below 0."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number that a tensor holds."""
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def _is_number_or_none(value: object) -> bool:
    return value is None or is_number(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _holds(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "step": (is_count, "a count"),
    "applied_steps": (is_count, "a count"),
    "samples": (is_count, "a count"),
    "world_size": (lambda value: is_count(value) and value != 0, "a number of ranks"),
    "strategy": (_is_text, "a word"),
    "dtype": (_is_text, "a word"),
    "config_digest": (_is_text, "a word"),
    "loss_scale": (_holds(lambda value: type(value) in (int, float)), "an object of numbers"),
    "loss": (_is_number_or_none, "a number or null"),
    "validation": (lambda value: value is None or _holds(is_number)(value), "null or an object of numbers"),
    "best": (_is_number_or_none, "a number or null"),
    "state": (_is_object, "an object"),
    "aliases": (_holds(_is_text), "an object of names"),
    "created": (is_number, "a time"),
    "files": (_is_object, "an object"),
}
"""What each field must be; what ``state`` holds is the training loop's to judge."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_safe_name(name: object) -> bool:
    """Whether ``name`` can only be a file right in the checkpoint's folder."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) is not None and name.strip(".") != ""


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
