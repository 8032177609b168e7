"""Predict the next byte of any folder of text.

Belongs here: the job. Does not belong here: the model (``gpt``), reading and cutting text (``text``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from launcher import Job, LossOutput
from launcher.errors import JobError

from .gpt import GPT
from .text import IGNORED, ByteWindows, read_corpus

__all__ = ["LanguageModelJob"]

_NUM_BYTES = 256


class LanguageModelJob(Job):
    """A GPT over bytes. An item is one predicted byte; ``bits_per_byte`` is the metric.

    Args:
        corpus: A folder of text; None stands for the source of Python's own standard library.
        pattern: Which of its files, as ``Path.rglob`` takes it.
        max_bytes: Where to stop reading; None reads everything.
        validation_fraction: Validation's share of the text, 0 for no validation.
        context: The length of a window, in bytes.
        vocabulary_size: At least 256; more is padding that no byte uses.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads per block.
        width: Size of the residual stream.
        dropout: The probability of dropping, in all places where GPT-2 does.

    Raises:
        JobError: ``vocabulary_size`` is too small; later, the corpus is missing, empty or too small.
    """

    def __init__(
        self,
        corpus: str | None = None,
        pattern: str = "*.py",
        max_bytes: int | None = None,
        validation_fraction: float = 0.05,
        context: int = 128,
        vocabulary_size: int = _NUM_BYTES,
        num_layers: int = 4,
        num_heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        if vocabulary_size < _NUM_BYTES:
            raise JobError(f"vocabulary_size is {vocabulary_size}; bytes need at least {_NUM_BYTES}.")
        self.corpus = corpus
        self.pattern = pattern
        self.max_bytes = max_bytes
        self.validation_fraction = validation_fraction
        self.context = context
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.width = width
        self.dropout = dropout

    def build_model(self) -> GPT:
        """Initialised as GPT-2."""
        return GPT(self.vocabulary_size, self.context, self.num_layers, self.num_heads, self.width, self.dropout)

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        """The text of both splits, read once."""
        return read_corpus(self.corpus, self.pattern, self.max_bytes, self.validation_fraction)

    def build_dataset(self, split: str) -> ByteWindows | None:
        """Samples ``(tokens, targets)``, both (context,)."""
        if split not in ("train", "validation"):
            raise JobError(f"There is no split {split!r}. Use train or validation.")
        if split == "validation" and self.validation_fraction == 0:
            return None
        text = self._text[split]
        if len(text) <= self.context:
            folder = self.corpus or "of Python's standard library"
            raise JobError(
                f"The corpus {folder} is too small: its {split} split has {len(text)} bytes, one window of "
                f"job.context={self.context} needs {self.context + 1}. Add text, lower job.context, or change "
                f"job.validation_fraction={self.validation_fraction}."
            )
        return ByteWindows(text, self.context)

    def compute_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        """Cross-entropy in FP32 over the targets that are not padding."""
        tokens, targets = batch
        logits = model(tokens).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        num_targets = (targets != IGNORED).sum()
        return LossOutput(loss, items=num_targets, metrics={"bits_per_byte": loss.detach() / math.log(2)})

    def parameter_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """Matrices decay as the optimizer says; vectors (biases, norms) do not decay."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
