"""How a checkpoint's files reach the disk: whole, digested on their way, synced, and named if they do not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import FileRecord

__all__ = ["DigestedFile", "WriteFailedError", "file_digest", "remove_tree", "sync_folder", "writing"]

_LARGE = 2**20
_BEHIND = 8 * 2**20
"""Bytes after which the kernel is asked to begin to bring them to the disk."""
_FILE_MODE, FOLDER_MODE = 0o644, 0o755  # whatever the umask: nobody else is to write


class WriteFailedError(Exception):
    """A file could not be written.

    Args:
        path: the file.
        reason: in the system's words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class DigestedFile:
    """A new file that is digested while it is written; a large piece by another thread while it is on its way.

    Args:
        path: must not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._size = self._begun = 0
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="tminus-digest")
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "wb", _LARGE)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of ``data``."""
        view = memoryview(data).cast("B")
        if view.nbytes >= _LARGE:
            digested = self._helper.submit(self._digest.update, view)
            try:
                self._file.write(view)
            finally:
                digested.result()
        else:
            self._digest.update(view)
            self._file.write(view)
        self._size += view.nbytes
        if self._size - self._begun >= _BEHIND:
            self._write_back()
        return view.nbytes

    def _write_back(self) -> None:
        """Have the disk work while the rest is digested, or ``close`` waits for all of it. Only advice: nothing depends
        on it. On Linux it starts the writing of what is changed in the range, and waits for none of it."""
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._file.fileno(), self._begun, self._size - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._size

    def flush(self) -> None:
        """Nothing: ``close`` does."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def close(self) -> FileRecord:
        """Sync the file to the disk; returns what it must be from now on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.abandon()
        return FileRecord(self._size, self._digest.hexdigest())

    def abandon(self) -> None:
        """Let go of the file, whatever is in it."""
        self._helper.shutdown()
        with suppress(OSError):
            self._file.close()


@contextmanager
def writing(path: Path, records: dict[str, FileRecord]) -> Iterator[Any]:
    """A new file to write to; its record is in ``records`` once it is on the disk.

    Raises:
        WriteFailedError: naming the file.
    """
    try:
        file = DigestedFile(path)
    except OSError as error:
        raise WriteFailedError(path, _words(error)) from error
    try:
        yield file
        records[path.name] = file.close()
    except Exception as error:
        raise WriteFailedError(path, _words(error)) from error
    finally:
        file.abandon()


def _words(error: Exception) -> str:
    """torch wraps an OSError of the stream that it writes to in a RuntimeError of its own."""
    following: BaseException | None = error
    while following is not None:
        if isinstance(following, OSError):
            return following.strerror or str(following)
        following = following.__cause__ or following.__context__
    return f"{type(error).__name__}: {error}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Have the folder's entries survive a crash of the machine. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as that is possible; of a link the link alone."""
    import shutil

    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
