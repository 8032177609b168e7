"""The shipped YAML files agree with the code that they configure."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("path", sorted((CONF / "job").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_config_lists_every_argument_with_its_default(path: Path) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    parameters = inspect.signature(get_class(config["_target_"])).parameters
    assert set(arguments) == set(parameters)
    for name, value in arguments.items():
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            assert value == "???"
        elif name not in {"criterion", "metrics"}:  # None in Python, spelt out in YAML
            assert value == default


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_says_in_one_line_what_it_is(path: Path) -> None:
    package, description, *_ = path.read_text(encoding="utf-8").splitlines()
    assert package == "# @package _global_"
    assert description.startswith("# ")
    assert description.endswith(".")
