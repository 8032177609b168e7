"""Gradients on the wire: 16 and 8 bits, on anybody's DDP or FSDP2 model.

``attach`` is for loops of one's own; T-minus's own goes through the same two functions.
"""

from launcher.compression.attach import attach
from launcher.compression.probe import OverflowProbe
from launcher.compression.replicated import attach_replicated, preferred_bucket_mib
from launcher.compression.sharded import attach_sharded
from launcher.compression.wire import Wire

__all__ = ["OverflowProbe", "Wire", "attach", "attach_replicated", "attach_sharded", "preferred_bucket_mib"]
