"""A RunConfig as ``config.yaml``, and back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.config.schema import RunConfig
from launcher.config.words import in_words
from launcher.errors import ConfigurationError

__all__ = ["load_config", "to_yaml"]


def to_yaml(config: RunConfig) -> str:
    """What ``config.yaml`` holds: every field, resolved."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    return text


def load_config(path: Path) -> RunConfig:
    """The RunConfig of a ``config.yaml``; needs no Hydra run.

    Raises:
        ConfigurationError: the file is not such a file.
    """
    try:
        written = OmegaConf.load(path)
        loaded = OmegaConf.merge(OmegaConf.structured(RunConfig), written)
        config = OmegaConf.to_object(loaded)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a run's configuration: {in_words(error)}") from error
    assert isinstance(config, RunConfig)
    if missing := [field.name for field in fields(RunConfig) if field.name not in written]:
        raise ConfigurationError(f"{path} is not a run's whole configuration: {', '.join(missing)} missing.")
    return config
