"""Building a model without ever holding it: record its initialisation, replay it one parameter at a time.

``build_model`` runs on fake tensors, which have a shape but no memory, while every torch operation is
recorded. Once the model is sharded, the operations run again, for real, on the CPU and in their order,
so that the random numbers are those of an ordinary build; each parameter is handed over as soon as
nothing more is done to it, and freed. A value that is about to be overwritten as a whole (a layer's own
initialisation, before the model's) is freed at once.

What cannot be recorded (code that looks at values) raises :class:`NotDeferrableError`; the caller then builds
the model as usual. Relies on torch's FakeTensorMode; ``tests/unit/test_deferred.py`` notices a change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DeferredModel", "NotDeferrableError", "build_deferred"]

_OVERWRITES = {
    "normal_",
    "uniform_",
    "zero_",
    "fill_",
    "random_",
    "exponential_",
    "bernoulli_",
    "copy_",
    "trunc_normal_",
}
"""In-place operations whose result does not depend on what their target held."""


class NotDeferrableError(Exception):
    """The model's initialisation cannot be recorded."""


@dataclass(frozen=True)
class _Place:
    """Where a fake tensor lies, as it was when an operation saw it."""

    storage: int
    num_bytes: int
    """Of the whole storage."""
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, fake: Tensor) -> _Place:
        storage = fake.untyped_storage()
        return cls(storage._cdata, storage.nbytes(), fake.dtype, int(fake.storage_offset()), fake.shape, fake.stride())

    @property
    def is_whole(self) -> bool:
        """Whether it covers its storage."""
        return self.shape.numel() * self.dtype.itemsize == self.num_bytes

    def real(self, memory: dict[int, torch.UntypedStorage]) -> Tensor:
        """The real tensor at this place; its content is undefined where nothing was kept."""
        if self.storage not in memory:
            memory[self.storage] = torch.UntypedStorage(self.num_bytes, device="cpu")  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=self.dtype).set_(memory[self.storage], self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Operation:
    name: str
    function: Any
    arguments: tuple[Any, ...]
    """With places instead of fake tensors; so are ``options`` and ``outputs``."""
    options: dict[str, Any]
    outputs: list[_Place]

    def storages(self) -> set[int]:
        """The storages that it reads or writes."""
        leaves = [*_leaves((self.arguments, self.options)), *self.outputs]
        return {leaf.storage for leaf in leaves if isinstance(leaf, _Place)}

    def overwrites(self, storage: int) -> bool:
        """Whether ``storage`` gets a new content as a whole, whatever it was."""
        target = self.arguments[0] if self.arguments else None
        if self.name not in _OVERWRITES or not isinstance(target, _Place):
            return False
        sources = _leaves((self.arguments[1:], self.options))
        reads = any(isinstance(leaf, _Place) and leaf.storage == storage for leaf in sources)
        return target.storage == storage and target.is_whole and not reads

    def run(self, memory: dict[int, torch.UntypedStorage]) -> None:
        """Do it for real."""
        arguments, options = _map(
            lambda leaf: leaf.real(memory) if isinstance(leaf, _Place) else leaf, (self.arguments, self.options)
        )
        values = [leaf for leaf in tree_leaves(self.function(*arguments, **options)) if isinstance(leaf, Tensor)]
        for place, value in zip(self.outputs, values, strict=True):
            kept = memory.get(place.storage)
            if kept is not None and value.untyped_storage().data_ptr() == kept.data_ptr():
                continue  # in place
            if value.stride() == place.stride and value.storage_offset() == place.offset:
                memory[place.storage] = value.untyped_storage()
            else:
                place.real(memory).copy_(value)


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=lambda node: isinstance(node, _Place))


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(function, tree, is_leaf=lambda node: isinstance(node, _Place))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation but views, which are told by their place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []
        self._alive: list[Any] = []  # a storage's address stays its own as long as the fake tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._places((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        has_outputs = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(result))
        of_real_data = not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))
        if has_outputs and (of_real_data or not func.is_view):
            self._record(func.overloadpacket.__name__, func, before, result)
        return result

    def _record(self, name: str, function: Any, before: Any, result: Any) -> None:
        outputs = [_Place.of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        self._alive.append((before, result))
        self.operations.append(_Operation(name, function, before[0], before[1], outputs))

    def _places(self, tree: Any) -> Any:
        self._alive.append(tree)
        return tree_map(lambda leaf: _Place.of(leaf) if isinstance(leaf, FakeTensor) else leaf, tree)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record operations, truncated normals as one: torch 2.13 draws them again until it likes the values."""
        real = torch.nn.init._no_grad_trunc_normal_

        def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._record("trunc_normal_", real, self._places(((tensor, *args), kwargs)), tensor)
            return tensor

        torch.nn.init._no_grad_trunc_normal_ = record
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), self:
                yield
        finally:
            torch.nn.init._no_grad_trunc_normal_ = real


@dataclass
class DeferredModel:
    """A model on the meta device, and how to fill it."""

    module: nn.Module
    operations: list[_Operation]
    values: dict[int, list[tuple[str, _Place]]]
    """By storage: the names of the parameters and buffers that live there, with their places."""
    constants: dict[str, Tensor]
    """Buffers that are real already."""
    peak_bytes: int = field(default=0, init=False)
    """The most memory that a replay has held."""

    def replay(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name and initial value, on the CPU, as soon as it is complete.

        A value is valid until the next is asked for. Uses the default CPU generator, as a build does.
        """
        yield from self.constants.items()
        memory: dict[int, torch.UntypedStorage] = {}
        frees = self._frees()
        with torch.no_grad():
            for index, operation in enumerate(self.operations):
                operation.run(memory)
                self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in memory.values()))
                for storage, complete in frees[index]:
                    if complete:
                        for name, place in self.values.get(storage, ()):
                            yield name, place.real(memory)
                    memory.pop(storage, None)

    def _frees(self) -> dict[int, list[tuple[int, bool]]]:
        """After which operation which storage is freed, and whether its value is then complete."""
        touching: dict[int, list[int]] = defaultdict(list)
        for index, operation in enumerate(self.operations):
            for storage in operation.storages():
                touching[storage].append(index)
        frees: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        for storage, indices in touching.items():
            for index, following in zip(indices, [*indices[1:], None], strict=True):
                if following is None:
                    frees[index].append((storage, True))
                elif self.operations[following].overwrites(storage):
                    frees[index].append((storage, False))
        return frees


def build_deferred(build: Callable[[], nn.Module]) -> DeferredModel:
    """Run ``build`` on fake tensors.

    Raises:
        NotDeferrableError: ``build`` looks at values, or leaves something that no operation has filled.
    """
    recorder = _Recorder()
    try:
        with recorder.recording():
            module = build()
    except Exception as error:  # whatever a user's code does when it cannot see values
        raise NotDeferrableError(f"{type(error).__name__}: {error}") from error
    values: dict[int, list[tuple[str, _Place]]] = defaultdict(list)
    constants: dict[str, Tensor] = {}
    filled = {output.storage for operation in recorder.operations for output in operation.outputs}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not isinstance(tensor, FakeTensor):
            constants[name] = tensor.detach()
            continue
        place = _Place.of(tensor)
        if place.storage not in filled:
            raise NotDeferrableError(f"{name} comes from outside of torch")
        values[place.storage].append((name, place))
    _to_meta(module)
    return DeferredModel(module, recorder.operations, dict(values), constants)


def _to_meta(module: nn.Module) -> None:
    """Replace all parameters and buffers by ones on the meta device; tied ones stay tied."""
    replaced: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = empty
        return replaced[id(tensor)]

    for part in module.modules():
        for registry in (part._parameters, part._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = meta(tensor)  # type: ignore[assignment]
