"""Codecs on a GPU do what they do on a CPU. Between GPUs they are unproven: one GPU is never several."""

from __future__ import annotations

import pytest
import torch

from launcher.compression.codecs import BlockInt8, Half

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]


@pytest.mark.parametrize(
    "codec", [Half(torch.float16), Half(torch.bfloat16), BlockInt8(128)], ids=["fp16", "bf16", "int8"]
)
def test_a_gpu_encodes_as_a_cpu_does(codec: Half | BlockInt8) -> None:
    values = torch.randn(128 * 1000, generator=torch.Generator().manual_seed(0)) * 100
    values[1000] = float("inf")
    values[5000] = float("nan")
    results = []
    for device in ("cpu", "cuda"):
        there = values.to(device)
        encoded = torch.empty(codec.encoded_bytes(values.numel()), dtype=torch.uint8, device=device)
        decoded = torch.empty_like(there)
        codec.encode(there, encoded)
        codec.decode(encoded, decoded)
        results.append(decoded.cpu())
    on_cpu, on_gpu = results
    assert torch.equal(on_cpu.isfinite(), on_gpu.isfinite())
    finite = on_cpu.isfinite()
    assert torch.allclose(on_cpu[finite], on_gpu[finite], rtol=1e-2, atol=1e-2)
