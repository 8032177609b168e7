"""Do the user's own sources hint at a stream that has not been imported yet?

Classes that are imported have been looked at themselves (``streams``). What is left is what only building the data
would bring: a class that is defined, or a module that is imported, inside of a function. It is looked for in the
sources of the modules that the job has brought, and nothing is run or imported for that.
"""

from __future__ import annotations

import ast
import importlib.util
import site
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import launcher

__all__ = ["hints_at_stream"]

_STREAMS = frozenset({"IterableDataset", "ChainDataset", "IterDataPipe", "datapipes"})
"""What torch calls them."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def hints_at_stream(imported: Mapping[str, ModuleType]) -> bool:
    """Whether a module of the user's names a stream, or has a function that imports one of theirs that does.

    Installed packages are not read: that would take seconds for large ones, and many have a stream that is not used.

    Args:
        imported: what has been imported with the job, as in ``sys.modules``; installed modules are left out.
    """
    waiting = [
        (name, Path(file))
        for name, module in imported.items()
        if (file := getattr(module, "__file__", None)) and _is_own(name, Path(file))
    ]
    seen = {path for _, path in waiting}
    while waiting:
        name, path = waiting.pop()
        tree = _parsed(path)
        if tree is None:
            continue
        if any(_names(node) & _STREAMS for node in ast.walk(tree)):
            return True
        for wanted in _imports(tree, name, path, only_later=name in imported):
            spec = None if wanted in imported else _spec(wanted)
            if spec is None or spec.origin is None:  # not there, or a folder without sources of its own
                continue
            origin = Path(spec.origin)
            if origin not in seen and _is_own(wanted, origin):
                seen.add(origin)
                waiting.append((wanted, origin))
    return False


@cache
def _foreign_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    found = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = str(Path(launcher.__file__).parent)
    return tuple(Path(one).resolve() for one in [*found, *site.getsitepackages(), site.getusersitepackages(), own])


def _is_own(name: str, path: Path) -> bool:
    """Whether a module is the user's: neither installed, nor Python's, nor T-minus's."""
    if path.suffix != ".py" or name.partition(".")[0] == "launcher":
        return False
    return not any(path.resolve().is_relative_to(folder) for folder in _foreign_folders())


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError):  # whoever imports it says what is wrong with it
        return None


def _names(node: ast.AST) -> set[str]:
    """What one node of a source names."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        module = getattr(node, "module", None) or ""
        return {part for name in (module, *(alias.name for alias in node.names)) for part in name.split(".")}
    return set()


def _imports(tree: ast.Module, name: str, path: Path, only_later: bool) -> Iterator[str]:
    """The modules that a source imports, or may: what is imported from one may be a module itself.

    Args:
        tree, name, path: of the source.
        only_later: not those that are imported with it, but those inside of its functions.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    places = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)] if only_later else [tree]
    for node in (inner for place in places for inner in ast.walk(place)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def _spec(name: str) -> ModuleSpec | None:
    """Where a module would come from; packages are not imported for that, as ``importlib.util.find_spec`` would."""
    above, _, _ = name.rpartition(".")
    places = None
    if above:
        package = _spec(above)
        if package is None or package.submodule_search_locations is None:
            return None
        places = list(package.submodule_search_locations)
    return PathFinder.find_spec(name, places)
