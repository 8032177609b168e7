"""Checkpoints: which there are, whether they can be trusted, and how one becomes one.

A checkpoint is a folder with a valid manifest, and every byte of every file in it is covered by a digest.
What is exported here is plain Python, so that the launching process can ask which checkpoint would be loaded
without importing torch. Writing (``saver``) and reading (``loading``, ``weights``) tensors need torch.
Does not belong here: what a learner's state is (``training.state``), when to save (``training.checkpointing``).
"""

from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.manifest import FileRecord, Manifest
from launcher.checkpoint.store import CheckpointStore, Found

__all__ = ["Checkpoint", "CheckpointStore", "FileRecord", "Found", "Manifest"]
