"""What ``attach`` says about what it cannot do; what it does needs ranks."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from launcher.compression import attach
from launcher.errors import ConfigurationError


@pytest.mark.parametrize(
    ("codec", "options", "words"),
    [
        ("int9", {}, ["codec='int9'", "fp16, bf16, int8, powersgd", "Did you mean 'int8'"]),
        ("none", {}, ["codec='none'", "fp16, bf16, int8, powersgd"]),
        (
            "int8",
            {"blocksize": 64},
            ["'blocksize'", "Did you mean 'block_size'", "Valid: accumulate, axis, block_size"],
        ),
        ("fp16", {"accumulate": "fp16"}, ["accumulate", "'fp16'", "wire, fp32"]),
        ("fp16", {"axis": "shard"}, ["axis", "'shard'", "replica, all"]),
        (["int8"], {}, ["codec=['int8']", "fp16, bf16, int8, powersgd"]),
        ("int8", {"block_size": "many"}, ["block_size", "=many"]),
        ("int8", {"block_size": 128.5}, ["block_size", "128.5"]),
        ("int8", {"error_feedback": "perhaps"}, ["error_feedback", "=perhaps"]),
        ("int8", {"scaler": "x"}, ["scaler='x'", "get_scale"]),
        ("int8", {}, ["Linear", "DistributedDataParallel", "fully_shard"]),
    ],
    ids=["codec", "no codec", "option", "accumulate", "axis", "list", "word", "fraction", "maybe", "scaler", "model"],
)
def test_a_mistake_is_named_with_what_is_valid(codec: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        attach(nn.Linear(2, 2), codec, **options)
    for word in words:
        assert word in str(caught.value)
