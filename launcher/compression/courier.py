"""Who runs the chunks while the backward pass goes on.

On CPUs one thread takes tensors in the order in which backward hands them over; it never starts a collective from
a future's callback, which gloo runs in another order on each rank. On CUDA a side stream does the same with no thread:
the host only enqueues.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.compression.links import Pending
from launcher.compression.pipeline import Chunk, Pipeline

__all__ = ["Courier", "Errand", "build_courier"]

_Future: Any = torch.futures.Future
_STOP_SECONDS = 5.0


@dataclass
class Errand:
    """Chunks to run, at least one, and what to hand over when all have come to their end."""

    chunks: Sequence[Chunk]
    result: Tensor
    finish: Callable[[], None] = lambda: None
    """Called when the result is there, before anybody is told."""
    future: Any = None
    _left: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._left = len(self.chunks)

    def counted(self) -> list[Chunk]:
        """The chunks, the last of which to end completes the errand."""
        return [self._counted(chunk) for chunk in self.chunks]

    def _counted(self, chunk: Chunk) -> Chunk:
        def course(slot: Any) -> Generator[Pending, None, None]:
            yield from chunk(slot)
            self._left -= 1
            if not self._left:
                self.finish()
                self.future.set_result(self.result)

        return course


class Courier(Protocol):
    """Takes errands; all ranks hand them over in the same order."""

    def take(self, errand: Errand) -> Any:
        """Start; returns a torch.futures.Future of ``errand.result``."""


def build_courier(pipeline: Callable[[], Pipeline[Any]], device: torch.device) -> Courier:
    """The one for a device; ``pipeline`` makes the pipeline when it is first needed."""
    return _StreamCourier(pipeline, device) if device.type == "cuda" else _ThreadCourier(pipeline)


class _StreamCourier:
    """On a CUDA stream of its own."""

    def __init__(self, pipeline: Callable[[], Pipeline[Any]], device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, errand: Errand) -> Any:
        """Enqueue everything; nothing is waited for."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        errand.future = _Future(devices=[self._device])
        with torch.cuda.stream(self._stream):
            errand.result.record_stream(self._stream)
            # The future remembers this stream when it is set, and whoever reads it waits for the stream.
            self._pipeline().run(errand.counted())
        return errand.future


class _ThreadCourier:
    """In a thread that is started with the first errand, and ends before the interpreter does."""

    def __init__(self, pipeline: Callable[[], Pipeline[Any]]) -> None:
        self._make_pipeline = pipeline
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, errand: Errand) -> Any:
        """Hand over to the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gradient-courier", daemon=True)
            self._thread.start()
            atexit.register(self._stop)
        errand.future = _Future()
        self._errands.put(errand)
        return errand.future

    def _stop(self) -> None:
        """A thread that wakes while the interpreter is taken down ends the process with an abort."""
        assert self._thread is not None
        self._errands.put(None)
        self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        """Until the process ends; after a failure every errand fails in the same way."""
        taken: list[Errand] = []
        try:
            self._run(self._make_pipeline(), taken)
        except BaseException as failure:  # told to whoever waits for a future: backward
            while True:
                for errand in taken:
                    if not errand.future.done():
                        errand.future.set_exception(failure)
                following = self._errands.get()
                if following is None:
                    return
                taken = [following]

    def _run(self, pipeline: Pipeline[Any], taken: list[Errand]) -> None:
        """Look for new errands before waiting for chunks under way; adds those not yet done to ``taken``."""
        chunks: deque[Chunk] = deque()
        while True:
            while not self._errands.empty() or (pipeline.is_idle and not chunks):
                errand = self._errands.get()
                if errand is None:
                    return
                taken[:] = [other for other in taken if not other.future.done()] + [errand]
                chunks.extend(errand.counted())
            if chunks and pipeline.has_room:
                pipeline.start(chunks.popleft())
            else:
                pipeline.advance()
