"""Classify images by comparing them with texts: handwritten digits against "a photo of the digit three".

A contrastive image-text model in the manner of CLIP (Radford et al., 2021), small enough to be trained
in FP16 on a CPU in seconds. Belongs here: the job and its two towers. Does not belong here: the dataset
(``digits_data``).

Both towers are made of reshaping, ``nn.Linear`` and GELU alone: FP16 convolutions are some twenty times
slower than this on CPUs without fast FP16 kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from launcher import Job, LossOutput
from launcher.errors import JobError

from .digits_data import DIGIT_NAMES, DigitsDataset

__all__ = ["DigitsJob", "ImageTextModel", "ImageTower", "TextTower", "encode_texts"]

_NUM_BYTES = 256
_PADDING_BYTE = 0
_LARGEST_TEMPERATURE = 100.0  # as in CLIP: keeps logits, and their gradients, in FP16's range


class DigitsJob(Job):
    """Ten texts, one per digit: an image belongs to the one that it resembles most.

    Raises:
        JobError: ``prompt`` has no place for the digit's name, so that all texts would be the same.
    """

    def __init__(
        self,
        prompt: str = "a photo of the digit {}",
        image_width: int = 16,
        text_width: int = 32,
        embedding_size: int = 64,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        if "{}" not in prompt:
            raise JobError(f"The prompt {prompt!r} has no {{}} where the digit's name goes. Try 'the digit {{}}'.")
        self.texts = encode_texts([prompt.replace("{}", name) for name in DIGIT_NAMES])
        self.image_width = image_width
        self.text_width = text_width
        self.embedding_size = embedding_size
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed

    def build_model(self) -> ImageTextModel:
        """An image tower, a text tower and a learned temperature."""
        return ImageTextModel(
            ImageTower(self.image_width, self.embedding_size),
            TextTower(self.text_width, self.embedding_size),
        )

    def build_dataset(self, split: str) -> DigitsDataset:
        """Samples ``(image, label_id)``."""
        return DigitsDataset(split, self.validation_fraction, self.split_seed)

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """``images`` (N, 8, 8), ``label_ids`` (N,), and once for all samples ``texts`` (10, length)."""
        images, label_ids = zip(*samples, strict=True)
        return {"images": torch.stack(images), "texts": self.texts, "label_ids": torch.stack(label_ids)}

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        """Cross-entropy over the ten texts, in FP32; ``accuracy`` counts the images that were told right."""
        images, texts, label_ids = batch["images"], batch["texts"], batch["label_ids"]
        output = model(images, texts).float()
        loss = F.cross_entropy(output, label_ids, reduction="sum")
        num_correct = (output.detach().argmax(dim=1) == label_ids).sum()
        return LossOutput(loss, items=len(label_ids), metrics={"accuracy": num_correct})

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The two towers: the model has no repeated part, and each of them is worth a shard."""
        return [child for child in model.children() if isinstance(child, (ImageTower, TextTower))]


def encode_texts(texts: Sequence[str]) -> Tensor:
    """UTF-8 bytes, int64 (number of texts, bytes of the longest), padded with zeros at the end."""
    encoded = [torch.tensor(list(text.encode("utf-8")), dtype=torch.int64) for text in texts]
    return pad_sequence(encoded, batch_first=True, padding_value=_PADDING_BYTE)


class ImageTextModel(nn.Module):
    """How alike images and texts are: the cosine of their embeddings, times a learned temperature."""

    def __init__(self, image_tower: nn.Module, text_tower: nn.Module) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.log_temperature = nn.Parameter(torch.empty(1))  # one element, not a scalar: FSDP2 refuses scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at a temperature of 10."""
        nn.init.constant_(self.log_temperature, math.log(10.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """FP32 logits (number of images, number of texts).

        The comparison is done in FP32: it is tiny, and squares of a norm leave FP16's range easily.
        """
        image_embeddings = self.image_tower(images)
        text_embeddings = self.text_tower(texts)
        with torch.autocast(images.device.type, enabled=False):
            similarity = F.normalize(image_embeddings.float(), dim=1) @ F.normalize(text_embeddings.float(), dim=1).T
            temperature = self.log_temperature.float().clamp(max=math.log(_LARGEST_TEMPERATURE)).exp()
            return temperature * similarity


class ImageTower(nn.Module):
    """Images (N, 8, 8) in [0, 1] to embeddings (N, embedding_size).

    A 3 x 3 convolution over all pixels, one of 2 x 2 without overlap, then one layer over all that is left.
    """

    def __init__(self, width: int, embedding_size: int, image_size: int = 8) -> None:
        super().__init__()
        self.image_size = image_size
        self.pixels = nn.Linear(3 * 3, width)
        self.squares = nn.Linear(2 * 2 * width, 2 * width)
        self.whole = nn.Linear((image_size // 2) ** 2 * 2 * width, embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, embedding_size), not normalised."""
        half = self.image_size // 2
        windows = F.pad(images, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # (N, 8, 8, 3, 3)
        pixels = F.gelu(self.pixels(windows.flatten(3)))  # (N, 8, 8, width)
        by_square = pixels.reshape(len(images), half, 2, half, 2, -1).transpose(2, 3)  # (N, 4, 4, 2, 2, width)
        squares = F.gelu(self.squares(by_square.flatten(3)))  # (N, 4, 4, 2 * width)
        embeddings: Tensor = self.whole(squares.flatten(1))
        return embeddings


class TextTower(nn.Module):
    """Texts as bytes (T, length) to embeddings (T, embedding_size).

    Each byte is embedded, seen with its neighbours in their order (a convolution over ``window`` bytes),
    and the text is the mean over what is not padding. The text may be of any length.
    """

    def __init__(self, width: int, embedding_size: int, window: int = 5) -> None:
        super().__init__()
        self.window = window
        self.byte_embedding = nn.Embedding(_NUM_BYTES, width // 2)
        self.neighbours = nn.Linear(window * (width // 2), width)
        self.whole = nn.Linear(width, embedding_size)

    def forward(self, texts: Tensor) -> Tensor:
        """Embeddings (T, embedding_size), not normalised."""
        is_text = (texts != _PADDING_BYTE).unsqueeze(2)
        embedded = self.byte_embedding(texts) * is_text
        margin = self.window // 2
        windows = F.pad(embedded, (0, 0, margin, self.window - 1 - margin)).unfold(1, self.window, 1)
        features = F.gelu(self.neighbours(windows.flatten(2))) * is_text  # (T, length, width)
        embeddings: Tensor = self.whole(features.sum(dim=1) / is_text.sum(dim=1).clamp(min=1))
        return embeddings
