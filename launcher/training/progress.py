"""How far a run has come, beside what the learner knows; from a learner to a snapshot, and back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from launcher.checkpoint import Manifest
from launcher.checkpoint.snapshot import Snapshot
from launcher.training import optimizer_state
from launcher.training.batches import Data
from launcher.training.restoring import Reading, take_up
from launcher.training.state import aliases, private_state, shared_tensors
from launcher.training.step import Learner

__all__ = ["Best", "Identity", "Progress", "continued", "take_snapshot"]


@dataclass(frozen=True)
class Identity:
    """What a checkpoint says of the run that it comes from."""

    strategy: str
    dtype: str
    config_digest: str
    seed: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    value: float
    metric: str
    """Of which it is the value."""
    mode: str
    """Whether the lowest (min) or the highest (max) is the best."""


@dataclass
class Progress:
    """What the loop counts, and a resumed run must know again."""

    offset: int = 0
    """Samples used up to a step are its number times the global batch size, plus this: not 0 once that has changed."""
    consecutive_skips: int = 0
    """Steps that no lower loss scale could have saved, in a row."""
    loss: float = math.nan
    """Of the last step whose numbers were read."""
    validation: dict[str, float] | None = None
    """After the step that was made last, if there was one."""
    best: Best | None = None
    """Of the validations; see ``checkpointing``."""


def take_snapshot(learner: Learner, data: Data, identity: Identity, progress: Progress, best: Best | None) -> Snapshot:
    """The state after the step that was made last; nothing is copied, moved or drawn.

    Raises:
        JobError: something cannot be saved.
    """
    validation = {name: value for name, value in (progress.validation or {}).items() if math.isfinite(value)}
    manifest = Manifest(
        step=learner.steps,
        applied_steps=int(learner.schedule.applied_steps.item()),
        samples=learner.steps * data.shape.global_batch_size + progress.offset,
        world_size=identity.world_size,
        strategy=identity.strategy,
        dtype=identity.dtype,
        config_digest=identity.config_digest,
        loss_scale=learner.loss_scale.state_dict(),
        loss=progress.loss if math.isfinite(progress.loss) else None,
        validation=validation if progress.validation is not None else None,
        best=best.value if best is not None else None,
        state={
            "best_of": [best.metric, best.mode] if best is not None else None,
            "consecutive_skips": progress.consecutive_skips,
            "expected_items": learner.expected_items,
            "global_batch_size": data.shape.global_batch_size,
            "num_samples": data.num_samples,
            "seed": identity.seed,
            "optimizer": type(learner.optimizer.optimizer).__name__,
            "optimizer_numbers": optimizer_state.numbers(learner),
        },
        aliases=aliases(learner.model.module),
        created=time.time(),
    )
    return Snapshot(shared_tensors(learner, identity.rank), private_state(learner, data), manifest)


def continued(learner: Learner, data: Data, identity: Identity, reading: Reading) -> tuple[Progress, list[str]]:
    """Put a freshly built learner where a checkpoint was taken; collective.

    Returns:
        The progress, and what is not as it was, in words.

    Raises:
        JobError: the checkpoint does not fit.
    """
    manifest = reading.checkpoint.manifest
    notes = take_up(learner, data, reading)
    saved, size = manifest.state, data.shape.global_batch_size
    if saved["global_batch_size"] != size:
        notes.append(f"the global batch was {saved['global_batch_size']} samples and is {size} from here on")
        learner.expected_items = None
    if saved["num_samples"] != data.num_samples:
        notes.append(
            f"the training data had {saved['num_samples']} samples and has {data.num_samples}: "
            "they come in another order from here on"
        )
    elif saved["seed"] != identity.seed and data.num_samples is not None:
        notes.append(f"seed was {saved['seed']} and is {identity.seed}: samples come in another order from here on")
    judged = saved.get("best_of")
    progress = Progress(
        offset=manifest.samples - manifest.step * size,
        consecutive_skips=saved["consecutive_skips"],
        loss=math.nan if manifest.loss is None else manifest.loss,
        validation=manifest.validation,
        best=Best(manifest.best, *judged) if manifest.best is not None and judged else None,
    )
    return progress, notes
