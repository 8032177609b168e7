"""Every field says what it means, and no YAML file holds a key that the schema lacks."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launcher.config import schema

CONF = Path(__file__).parents[2] / "conf"
DATACLASSES = [kind for kind in vars(schema).values() if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]
GROUPS = {field.name: field.type for field in dataclasses.fields(schema.RunConfig)}
FREE = {"job", "optimizer", "hydra", "defaults"}


def unknown_keys(kind: Any, tree: dict[str, Any], prefix: str) -> list[str]:
    types = typing.get_type_hints(kind)
    found = []
    for key, value in tree.items():
        if key not in types:
            found.append(f"{prefix}{key}")
        elif dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            found += unknown_keys(types[key], value, f"{prefix}{key}.")
    return found


def test_every_field_is_followed_by_its_documentation() -> None:
    tree = ast.parse(inspect.getsource(schema))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {kind.__name__ for kind in DATACLASSES} <= {node.name for node in classes}
    for node in classes:
        assert ast.get_docstring(node), node.name
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)}"


def test_every_public_class_is_listed() -> None:
    defined = {name for name, value in vars(schema).items() if getattr(value, "__module__", "") == schema.__name__}
    assert defined == set(schema.__all__)


@pytest.mark.parametrize(
    "path",
    sorted(path for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] != "hydra"),
    ids=lambda path: str(path.relative_to(CONF)),
)
def test_every_key_of_a_yaml_file_exists_in_the_schema(path: Path) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    group = path.relative_to(CONF).parts[0]
    if group in FREE:
        return
    known = {key: value for key, value in tree.items() if key not in FREE}
    kind = (
        schema.RunConfig if group in ("launch.yaml", "experiment") else typing.get_type_hints(schema.RunConfig)[group]
    )
    assert unknown_keys(kind, known, "") == []


@pytest.mark.parametrize(
    ("group", "key", "enum"),
    [
        ("parallel", "strategy", schema.Strategy),
        ("schedule", "decay", schema.Decay),
        ("precision", "dtype", schema.Dtype),
    ],
)
def test_every_choice_of_an_enumeration_has_an_option_file(group: str, key: str, enum: Any) -> None:
    offered = {OmegaConf.load(path)[key] for path in (CONF / group).glob("*.yaml")}
    assert offered == {member.value for member in enum}


def test_the_yaml_files_of_a_group_are_found() -> None:
    assert {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"} <= {
        *GROUPS,
        "experiment",
        "hydra",
    }
