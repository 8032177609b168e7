"""The only place where a model learns of ranks."""

from launcher.parallel.parallelize import Layout, ParallelModel, parallelize

__all__ = ["Layout", "ParallelModel", "parallelize"]
