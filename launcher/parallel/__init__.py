"""The only place where a model learns of ranks."""

from launcher.parallel.parallelize import ParallelModel, parallelize

__all__ = ["ParallelModel", "parallelize"]
