"""Who runs the chunks while the backward pass goes on.

On CPUs one thread takes tensors in the order in which backward hands them over; it never starts a collective from
a future's callback, which gloo runs in another order on each rank. On CUDA a side stream does the same with no thread:
the host only enqueues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.compression.pipeline import Chunk, Course, Pipeline
from launcher.compression.servants import serve

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
        def course(slot: Any) -> Course:
            sent = yield from chunk(slot)
            self._left -= 1
            if not self._left:
                self.finish()
                self.future.set_result(self.result)
            return sent

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
    """In a thread that is started with the first errand, and ends with the courier or the interpreter."""

    def __init__(self, make_pipeline: Callable[[], Pipeline[Any]]) -> None:
        self._make_pipeline = make_pipeline
        self._pipeline: Pipeline[Any] | None = None

    def take(self, errand: Errand) -> Any:
        """Hand over to the thread."""
        if self._pipeline is None:
            pipeline = self._pipeline = self._make_pipeline()
            stop = partial(pipeline.inbox.put, None)
            serve(self, "gradient-courier", partial(_work, pipeline), stop, _STOP_SECONDS)
        errand.future = _Future()
        self._pipeline.inbox.put(errand)
        return errand.future


def _work(pipeline: Pipeline[Any]) -> None:
    """Until ``None`` is in the inbox; after a failure every errand fails in the same way."""
    taken: list[Errand] = []
    try:
        _run(pipeline, taken)
    except BaseException as failure:  # told to whoever waits for a future: backward
        while True:
            for errand in taken:
                if not errand.future.done():
                    errand.future.set_exception(failure)
            following = pipeline.inbox.get()
            if following is None:
                return
            taken = [following] if isinstance(following, Errand) else []


def _run(pipeline: Pipeline[Any], taken: list[Errand]) -> None:
    """Wait for errands and arrivals alike; start chunks when it is time. Adds errands not yet done to ``taken``."""
    chunks: deque[Chunk] = deque()
    while True:
        following = pipeline.inbox.get()
        if following is None:
            return
        if isinstance(following, Errand):
            taken[:] = [other for other in taken if not other.future.done()] + [following]
            chunks.extend(following.counted())
        else:
            pipeline.advance(following)
        while chunks and pipeline.should_start:
            pipeline.start(chunks.popleft())
