"""A user's job that says which samples it has seen."""

import torch
from own_job import Own


class Counted(Own):
    def build_dataset(self, split):
        dataset = super().build_dataset(split)
        return torch.utils.data.TensorDataset(*dataset.tensors, torch.arange(len(dataset)))

    def compute_loss(self, model, batch):
        inputs, targets, numbers = batch
        print("samples", *numbers.tolist())
        return super().compute_loss(model, (inputs, targets))
