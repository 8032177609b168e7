"""``launch export RUN out.safetensors``: a run's weights in one file that plain PyTorch loads.

The file holds every name of the model's ``state_dict``. safetensors refuses tensors that share memory, so weights
that are tied in the model are written once for each name: ``load_state_dict(load_file(path))`` is strict, and fits.
Of what modules give as ``get_extra_state`` it holds the tensors, as they are; the rest is named and left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint import Checkpoint, CheckpointStore
from launcher.checkpoint.judging import Problem, judging
from launcher.clusters.safety import refuse_shared_run
from launcher.config.schema import Dtype, Verify
from launcher.errors import EXIT_FINISHED, CheckpointError, RequestError
from launcher.rundir import RunDirectory
from launcher.rundir.find import find_run
from launcher.verbs.words import VerbParser

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["act"]

_TRUST = "--trust-shared-directory"


def act(words: Sequence[str]) -> int:
    """Write a checkpoint's weights to a file; returns the exit code.

    Raises:
        RunError: no run is meant, or several; or another user could have written into it.
        CheckpointError: there is no valid checkpoint.
        RequestError: the file cannot be written there, or the weights do not fit the type.
    """
    options = _parser().parse_args(list(words))
    target = Path(options.file)
    _check_target(target, options.force)
    run = find_run(options.run, Path(options.runs_root))
    refuse_shared_run(run, options.trust_shared_directory, how_to_trust=_TRUST)
    checkpoint, weights, extra_state = _loaded(run, options.step, options.trust_shared_directory)
    extra = _tensors(extra_state)
    dtype = Dtype(options.dtype)
    metadata = {
        "format": "pt",
        "tminus_run": f"{run.path.parent.name}/{run.id}",
        "tminus_step": str(checkpoint.step),
        "tminus_tied": json.dumps(_tied(weights)),
    }
    _write(_converted(weights, dtype) | extra, metadata, target)
    print(f"{target}: {len(weights) + len(extra)} tensors of step {checkpoint.step} as {dtype.value}")
    return EXIT_FINISHED


def _parser() -> VerbParser:
    parser = VerbParser("export", "Write a run's weights to a .safetensors file that plain PyTorch loads.")
    parser.add_argument("file", metavar="FILE", help="where to write, such as out.safetensors")
    parser.add_argument("--dtype", choices=[dtype.value for dtype in Dtype], default=Dtype.float32.value)
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest valid one if not given")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(_TRUST, action="store_true", help="load what another user could have written")
    return parser


def _check_target(target: Path, force: bool) -> None:
    if target.is_dir() or not target.name:
        raise RequestError(f"{target} is a folder: name a file in it, such as {target / 'model.safetensors'}.")
    if target.exists() and not target.is_file():
        raise RequestError(f"{target} is neither a file nor a folder, and is not replaced: name a file.")
    if os.path.lexists(target) and not force:
        raise RequestError(f"{target} is there already: name another file, or replace it with --force.")
    if not os.access(target.parent, os.W_OK):
        raise RequestError(f"{target} cannot be written: {target.parent} is no folder that you can write to.")


def _loaded(run: RunDirectory, step: int | None, trusted: bool) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Any]]:
    """The weights and the extra state of the checkpoint that was asked for, or of the newest that can be loaded.

    A run that goes on may remove what is being read here, once it has written another: that one is taken then.
    """
    from launcher.checkpoint.weights import load_extra_state, load_model_weights

    store = CheckpointStore(run.checkpoints)
    passed_over: dict[Path, Problem] = {}
    while candidates := [
        each for each in store.candidates() if step in (None, each.step) and each.path not in passed_over
    ]:
        checkpoint = candidates[0]
        problem = checkpoint.problem(Verify.full, trusted)
        if problem is None:
            with judging() as verdict:
                weights, extra = load_model_weights(checkpoint), load_extra_state(checkpoint)
            problem = verdict.problem
        if problem is None:
            if there := _listed(passed_over):
                print(f"warning: passed over:\n{there}")
            return checkpoint, weights, extra
        passed_over[checkpoint.path] = problem
    if passed_over:
        raise CheckpointError(f"The run {run.path} has no checkpoint that can be used:\n{_listed(passed_over)}")
    if known := sorted(each.step for each in store.candidates()):
        named = ", ".join(map(str, known))
        raise CheckpointError(f"--step {step}: there is no such checkpoint. There are those of step {named}.")
    raise CheckpointError(f"The run {run.path} has no checkpoint: there are no weights to export.")


def _listed(passed_over: dict[Path, Problem]) -> str:
    """Those that are still there."""
    return "\n".join(f"  {path}: {reason}" for path, reason in passed_over.items() if path.exists())


def _tensors(extra: dict[str, Any]) -> dict[str, Tensor]:
    """The extra states that are tensors, each in memory of its own; says which are not."""
    from torch import Tensor

    others = sorted(name for name, value in extra.items() if not isinstance(value, Tensor))
    if others:
        print(
            f"warning: not in the file, since they are no tensors: {', '.join(others)}. Plain PyTorch loads the others "
            "with load_state_dict(..., strict=False)."
        )
    return {name: value.contiguous().clone() for name, value in extra.items() if isinstance(value, Tensor)}


def _tied(weights: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that the model knows under an earlier name too, with that name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in weights.items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return tied


def _converted(weights: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Floating-point values in ``dtype``, others as they are; each tensor in memory of its own."""
    import torch

    target: torch.dtype = getattr(torch, dtype.value)
    converted: dict[str, Tensor] = {}
    too_large = []
    owners: set[int] = set()
    for name, tensor in weights.items():
        value = tensor.to(target) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not torch.equal(value.isfinite(), tensor.isfinite()):
            too_large.append(name)
        value = value.contiguous()
        converted[name] = value.clone() if value.data_ptr() in owners else value
        owners.add(value.data_ptr())
    if too_large:
        shown = ", ".join(too_large[:5]) + (f" and {len(too_large) - 5} more" if len(too_large) > 5 else "")
        raise RequestError(f"--dtype {dtype.value} has no room for values of {shown}: use bfloat16 or float32.")
    return converted


def _write(weights: dict[str, Tensor], metadata: dict[str, str], target: Path) -> None:
    """The whole file or none: a temporary one beside it, synced, then renamed."""
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(weights, temporary, metadata)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fchmod(descriptor, 0o666 & ~_umask())  # safetensors makes a file that only its owner can read
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except Exception as error:  # safetensors has exceptions of its own for a full disk
        raise RequestError(f"{target} could not be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
