"""A folder of text as windows of bytes: reading it once, splitting it, cutting it.

Belongs here: files and bytes. Does not belong here: models and losses.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from launcher.errors import JobError

__all__ = ["IGNORED", "ByteWindows", "read_corpus"]

IGNORED = -100
"""The target of a position that is padding: neither counted nor learned from (``F.cross_entropy``'s default)."""

_DOCUMENT_END = b"\0"
_LARGEST_DOCUMENT_BYTES = 64 * 1024
_FOLDERS_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"})


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Text cut into windows. A sample is ``(tokens, targets)``, both int64 (context,): targets are one byte ahead.

    Each byte but the first is a target exactly once: the last window is filled up with targets that
    are :data:`IGNORED`.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text  # uint8 (number of bytes,)
        self.context = context

    def __len__(self) -> int:
        return -(-(len(self.text) - 1) // self.context)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        tokens = torch.zeros(self.context, dtype=torch.int64)
        targets = torch.full((self.context,), IGNORED)
        tokens[: len(window) - 1] = window[:-1]
        targets[: len(window) - 1] = window[1:]
        return tokens, targets


def read_corpus(
    folder: str | Path | None, pattern: str, max_bytes: int | None, validation_fraction: float
) -> dict[str, Tensor]:
    """The text of each split, uint8 (number of bytes,).

    Files are read in the order of their paths, up to ``max_bytes`` in all. Each is a document; a long
    one is cut into several, so that one big file can be split too. Documents go to validation in the
    order of a hash of their names, until it has its share: the same on every machine and in every run.

    Args:
        folder: Where the text is; None stands for the source of Python's own standard library.
        pattern: Which files, as ``Path.rglob`` takes it.
        max_bytes: Where to stop reading; None reads everything.
        validation_fraction: Validation's share of the bytes, 0 for none.

    Raises:
        JobError: ``folder`` is missing, or has no text that ``pattern`` matches.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise JobError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1, say 0.05.")
    root = Path(sysconfig.get_path("stdlib")) if folder is None else Path(folder)
    if not root.is_dir():
        raise JobError(f"The corpus {root} is not a folder. Set job.corpus to a folder of text files.")
    left_out = _FOLDERS_LEFT_OUT if folder is None else frozenset()
    documents = dict(_read_documents(root, pattern, max_bytes, left_out))
    if not documents:
        raise JobError(
            f"The corpus {root} has no text in files that match {pattern!r}. "
            "Set job.pattern to match them, or job.corpus to another folder."
        )
    chosen = _choose_validation(documents, validation_fraction)
    return {
        "train": _join(document for name, document in documents.items() if name not in chosen),
        "validation": _join(document for name, document in documents.items() if name in chosen),
    }


def _read_documents(
    root: Path, pattern: str, max_bytes: int | None, left_out: frozenset[str]
) -> Iterator[tuple[str, bytes]]:
    """Named documents, up to ``max_bytes`` in all."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern)}
    remaining = max_bytes
    for name in sorted(paths):
        if remaining == 0:
            return
        if left_out.intersection(name.split("/")[:-1]) or not paths[name].is_file():
            continue
        with paths[name].open("rb") as file:
            text = file.read(-1 if remaining is None else remaining)
        remaining = None if remaining is None else remaining - len(text)
        for start in range(0, len(text), _LARGEST_DOCUMENT_BYTES):
            yield f"{name}#{start}", text[start : start + _LARGEST_DOCUMENT_BYTES]


def _choose_validation(documents: dict[str, bytes], fraction: float) -> set[str]:
    """The names of the documents that validation gets: ``fraction`` of the bytes, within one document."""
    wanted = fraction * sum(map(len, documents.values()))
    chosen: set[str] = set()
    taken = 0
    for name in sorted(documents, key=lambda name: (zlib.crc32(name.encode("utf-8", "surrogateescape")), name)):
        if taken >= wanted:
            break
        chosen.add(name)
        taken += len(documents[name])
    return chosen


def _join(documents: Iterator[bytes]) -> Tensor:
    """One uint8 tensor, with a zero byte after each document."""
    text = bytearray().join(document + _DOCUMENT_END for document in documents)
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
