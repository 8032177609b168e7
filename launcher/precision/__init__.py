"""Mixed precision: the loss scale, the one collective of a step, and the folded optimizer step."""

from launcher.precision.attribution import Attribution, attribute
from launcher.precision.control import NO_VOTES, Agreement, CheckpointVotes, ControlCollective, Sums
from launcher.precision.folded import FoldedOptimizer, Gradients
from launcher.precision.grad_scaler import DistributedGradScaler
from launcher.precision.loss_scale import DynamicLossScale, LossScale, NoLossScale, build_loss_scale
from launcher.precision.stepped import SteppedParameters, is_elementwise

__all__ = [
    "NO_VOTES",
    "Agreement",
    "Attribution",
    "CheckpointVotes",
    "ControlCollective",
    "DistributedGradScaler",
    "DynamicLossScale",
    "FoldedOptimizer",
    "Gradients",
    "LossScale",
    "NoLossScale",
    "SteppedParameters",
    "Sums",
    "attribute",
    "build_loss_scale",
    "is_elementwise",
]
