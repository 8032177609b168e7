"""Configurations to vary in tests."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from launcher.config.schema import Device, RunConfig

__all__ = ["good_config"]


def good_config(**changes: Any) -> RunConfig:
    """A configuration that passes every rule on two CPU workers, changed at dotted keys (``__`` for the dot)."""
    config = RunConfig(device=Device.cpu)
    config.job = {"_target_": "launcher.jobs.digits.DigitsJob"}
    config.optimizer = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
    config.train.max_steps = 100
    config.train.global_batch_size = 64
    config.train.micro_batch_size = 8
    config.cluster.processes_per_node = 2
    if not changes:
        return config
    tree: Any = OmegaConf.structured(config)
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value)
    changed = OmegaConf.to_object(tree)
    assert isinstance(changed, RunConfig)
    return changed
