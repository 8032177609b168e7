"""Composing in this process, with what Hydra would run only written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from launcher.config.compose import compose
from launcher.config.schema import RunConfig
from launcher.errors import ConfigurationError

__all__ = ["Recorder", "composed", "refused"]


@dataclass
class Recorder:
    """Keeps what it is called with, in order."""

    prepared: list[RunConfig] = field(default_factory=list)
    ran: list[RunConfig] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def prepare(self, config: RunConfig) -> list[str]:
        self.order.append("prepare")
        self.prepared.append(config)
        return ["a warning"]

    def command(self, config: RunConfig, warnings: list[str]) -> float:
        assert warnings == ["a warning"]
        self.order.append("command")
        self.ran.append(config)
        return 0.0


def composed(*argv: str) -> RunConfig:
    recorder = Recorder()
    compose(argv, recorder.prepare, recorder.command)
    (config,) = recorder.ran
    return config


def refused(argv: Sequence[str]) -> str:
    recorder = Recorder()
    with pytest.raises(ConfigurationError) as caught:
        compose(argv, recorder.prepare, recorder.command)
    assert recorder.ran == []
    return str(caught.value)
