"""Example jobs that are real: digits (images against texts), a byte-level language model, any supervised model.

Installed as ``launcher.jobs``. Each module holds one :class:`launcher.Job`, named by ``_target_`` in
``conf/job/``. Nothing here knows of ranks, precision or files of a run.
"""
