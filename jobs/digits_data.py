"""Handwritten digits as a dataset: 1,797 images of 8 x 8 pixels, bundled with scikit-learn.

Belongs here: reading them and splitting them. Does not belong here: models and losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from launcher.errors import JobError

__all__ = ["DIGIT_NAMES", "DigitsDataset"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The name of each class, by ``label_id``."""

_SPLITS = ("train", "validation")
_BRIGHTEST = 16.0


class DigitsDataset(Dataset[tuple[Tensor, Tensor]]):
    """One split of the digits. A sample is ``(image, label_id)``: FP32 (8, 8) in [0, 1], and an int64 scalar.

    Every class gives the same fraction of its images to validation. Which ones depends on
    ``split_seed`` alone, never on the run's seed, so that runs can be compared.

    Raises:
        JobError: scikit-learn is missing, or ``split`` or ``validation_fraction`` is not a valid one.
    """

    def __init__(self, split: str, validation_fraction: float = 0.2, split_seed: int = 0) -> None:
        if split not in _SPLITS:
            raise JobError(f"There is no split {split!r}. Use one of: {', '.join(_SPLITS)}.")
        if not 0.0 < validation_fraction < 1.0:
            raise JobError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, say 0.2.")
        images, label_ids = _read_digits()
        self.indices = _split_indices(label_ids, split, validation_fraction, split_seed)
        """Where each sample stands among all 1,797 images."""
        self.images = images[self.indices]
        self.label_ids = label_ids[self.indices]

    def __len__(self) -> int:
        return len(self.label_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.label_ids[index]


def _read_digits() -> tuple[Tensor, Tensor]:
    """All images (1797, 8, 8) in [0, 1], and their label ids (1797,)."""
    try:
        # Imported here because scikit-learn takes a second to import.
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise JobError(
            "The digits are bundled with scikit-learn, which is not installed. Install it: pip install scikit-learn"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / _BRIGHTEST
    return images, torch.tensor(digits.target, dtype=torch.int64)


def _split_indices(label_ids: Tensor, split: str, validation_fraction: float, split_seed: int) -> Tensor:
    """The sorted indices of one split, drawn class by class."""
    generator = torch.Generator().manual_seed(split_seed)
    chosen = []
    for label_id in range(len(DIGIT_NAMES)):
        of_class = (label_ids == label_id).nonzero().flatten()
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        num_validation = round(len(of_class) * validation_fraction)
        chosen.append(shuffled[:num_validation] if split == "validation" else shuffled[num_validation:])
    return torch.cat(chosen).sort().values
