"""A run's configuration as Hydra's primary one, so that a resume's overrides mean what they mean for a new run."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from launcher.config.schema import RunConfig

__all__ = ["PRIMARY", "store_resumed"]

PRIMARY = "tminus_resumed"


def store_resumed(beginning: RunConfig, argv: Sequence[str], places: Sequence[Any]) -> list[str]:
    """Put a run's configuration beside ``launch.yaml``, which Hydra's own settings are taken from.

    A group that is chosen anew (``parallel=fsdp``) replaces the run's own as a whole: it is left out here.

    Args:
        beginning: of the run.
        argv: the command line.
        places: the folders that groups are looked for in.

    Returns:
        ``argv`` with each choice of a group written as an addition: the run has its groups' values, not their names.
    """
    words, chosen = [], set()
    for word in argv:
        key, assigned, _ = word.partition("=")
        group = key.lstrip("+")
        is_group = bool(assigned) and group.isidentifier() and any((place / group).is_dir() for place in places)
        if is_group:
            chosen.add(group)
        words.append(f"+{word.lstrip('+')}" if is_group else word)
    shipped = importlib.resources.files("launcher.conf") / "launch.yaml"
    launch = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    own = [entry for entry in launch["defaults"] if entry in ("tminus_schema", "_self_") or "override" in str(entry)]
    values = OmegaConf.to_container(OmegaConf.structured(beginning), enum_to_str=True)
    assert isinstance(values, dict)
    kept = {key: value for key, value in values.items() if key not in chosen}
    node = OmegaConf.create({"defaults": own, "hydra": launch["hydra"], **kept})
    ConfigStore.instance().store(name=PRIMARY, node=node)
    return words
