"""T-minus trains a PyTorch model in mixed precision on many GPUs, and brings the run back.

Importing this package does not import torch.
"""

from launcher.job import Job, LossOutput

__all__ = ["Job", "LossOutput", "__version__"]

__version__ = "0.1.0"
