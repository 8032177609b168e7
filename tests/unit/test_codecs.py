"""What codecs lose, and what they never lose: arithmetic, no processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.many_ranks import Values, exchanged_mean, hook_ring_mean, ring_mean
from launcher.compression.codecs import BlockInt8, Codec, Half

HALVES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The largest relative error of a normal number."""
BLOCK_SIZES = st.integers(1, 64).map(lambda quarter: 4 * quarter)


def through(codec: Codec, values: Tensor) -> Tensor:
    encoded = torch.empty(codec.encoded_bytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, encoded)
    decoded = torch.empty_like(values)
    codec.decode(encoded, decoded)
    return decoded


def random_values(numel: int, seed: int, spread: float = 3.0) -> Tensor:
    """Over several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.randn(numel, generator=generator) * spread
    return torch.randn(numel, generator=generator) * torch.exp(magnitudes)


@given(BLOCK_SIZES, st.integers(1, 9), st.integers(0, 2**31))
def test_int8_is_off_by_at_most_half_a_step_of_its_block(block_size: int, num_blocks: int, seed: int) -> None:
    values = random_values(block_size * num_blocks, seed)
    errors = (through(BlockInt8(block_size), values) - values).double().abs().view(num_blocks, block_size)
    largest = values.double().abs().view(num_blocks, block_size).amax(dim=1, keepdim=True)
    # half of a step; FP32 rounds the scale, its reciprocal and two products
    assert (errors <= largest / 254 * (1 + 254 * 4 * 2.0**-24)).all()


@given(BLOCK_SIZES, st.sampled_from([math.inf, -math.inf, math.nan]), st.integers(0, 2**31), st.data())
def test_int8_spoils_the_whole_block_and_no_other(
    block_size: int, spoilt: float, seed: int, data: st.DataObject
) -> None:
    values = random_values(3 * block_size, seed)
    clean = through(BlockInt8(block_size), values)
    place = data.draw(st.integers(0, values.numel() - 1))
    values[place] = spoilt
    blocks = through(BlockInt8(block_size), values).view(3, block_size)
    hit = place // block_size
    assert not blocks[hit].isfinite().any()
    others = [block for block in range(3) if block != hit]
    assert torch.equal(blocks[others], clean.view(3, block_size)[others])


@pytest.mark.parametrize("spoilt", [math.inf, -math.inf, math.nan])
def test_a_block_of_nothing_else_is_not_finite_either(spoilt: float) -> None:
    assert not through(BlockInt8(8), torch.full((8,), spoilt)).isfinite().any()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 1e-31, -1e-30])
def test_tiny_blocks_come_back_finite_and_as_small(value: float) -> None:
    decoded = through(BlockInt8(4), torch.full((4,), value))
    assert decoded.isfinite().all()
    assert (decoded.abs() <= max(2 * abs(value), 1e-32)).all()


def test_the_largest_numbers_survive_int8() -> None:
    largest = torch.finfo(torch.float32).max
    decoded = through(BlockInt8(4), torch.tensor([largest, -largest, 0.0, 1.0]))
    assert decoded.isfinite().all()
    assert decoded[:2].tolist() == pytest.approx([largest, -largest], rel=1e-6)


def test_a_blocks_largest_value_is_exact_to_a_rounding() -> None:
    values = torch.tensor([0.1, -12.7, 3.0, 0.0])
    assert through(BlockInt8(4), values)[1].item() == pytest.approx(-12.7, rel=1e-6)


@given(st.sampled_from(list(HALVES)), st.integers(1, 100), st.integers(0, 2**31))
def test_halves_round_to_the_nearest(dtype: torch.dtype, words: int, seed: int) -> None:
    values = random_values(2 * words, seed, spread=1.0)
    errors = (through(Half(dtype), values) - values).double().abs()
    # below FP16's smallest normal number, half of its smallest step
    assert (errors <= values.double().abs() * HALVES[dtype] + 2.0**-25).all()


@pytest.mark.parametrize("dtype", list(HALVES))
def test_halves_hand_on_what_is_not_finite_where_it_is(dtype: torch.dtype) -> None:
    decoded = through(Half(dtype), torch.tensor([1.0, math.inf, -math.inf, math.nan, 2.0, 0.0]))
    assert decoded[:3].tolist() == [1.0, math.inf, -math.inf]
    assert decoded[3].isnan()
    assert decoded[4:].tolist() == [2.0, 0.0]


def test_beyond_float16_is_infinite_and_bfloat16_has_room() -> None:
    values = torch.tensor([1e5, -1e5])
    assert through(Half(torch.float16), values).tolist() == [math.inf, -math.inf]
    assert through(Half(torch.bfloat16), values).tolist() == pytest.approx([1e5, -1e5], rel=2.0**-8)


@given(st.sampled_from([Half(torch.float16), Half(torch.bfloat16), BlockInt8(4), BlockInt8(128)]), st.integers(1, 40))
def test_encoded_bytes_are_what_is_written(codec: Codec, pieces: int) -> None:
    numel = codec.block_size * pieces
    encoded = torch.full((codec.encoded_bytes(numel) + 4,), 77, dtype=torch.uint8)
    codec.encode(torch.randn(numel), encoded[:-4])
    assert encoded[-4:].tolist() == [77] * 4
    per_value = codec.encoded_bytes(numel) / numel
    assert per_value == (2 if isinstance(codec, Half) else 1 + 4 / codec.block_size)


@pytest.mark.parametrize("codec", [Half(torch.float16), BlockInt8(8)])
def test_a_decoded_sum_is_the_sum_of_what_is_decoded(codec: Codec) -> None:
    values, total = random_values(64, 1, 1.0), random_values(64, 2, 1.0)
    decoded = through(codec, values)
    expected = total + decoded
    rounding = (total.abs() + decoded.abs()) * 2.0**-23  # a product may be rounded once less
    encoded = torch.empty(codec.encoded_bytes(64), dtype=torch.uint8)
    codec.encode(values, encoded)
    codec.add_decoded(encoded, total)
    assert ((total - expected).abs() <= rounding).all()


@given(
    st.sampled_from([Half(torch.float16), Half(torch.bfloat16), BlockInt8(4), BlockInt8(32)]),
    st.lists(st.sampled_from([0.0, 1.0, -70000.0, 1e-44, 3.4e38, math.inf, -math.inf, math.nan]), max_size=3),
    st.integers(0, 2**31),
)
def test_a_witness_is_finite_if_all_that_came_back_is_and_all_that_was_lost(
    codec: Codec, special: list[float], seed: int
) -> None:
    values = random_values(96, seed, 1.0)
    places = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[: len(special)]
    values[places] = torch.tensor(special)
    encoded, lost = torch.empty(codec.encoded_bytes(96), dtype=torch.uint8), torch.empty(96)
    codec.encode(values, encoded, lost)
    for found in (through(codec, values), lost):
        assert codec.witness(encoded, found).isfinite().all() == found.isfinite().all()


def spread_out(num_ranks: int) -> dict[str, Values]:
    """What overflows in torch's hook, and on the way of a sum in 16 bits; never in the mean."""
    large = 1.2e5

    def alternating(rank: int) -> Tensor:
        return torch.full((4,), large if rank % 2 else -large)

    def one(rank: int) -> Tensor:
        return torch.full((4,), large if rank == num_ranks // 2 else 0.0)

    def halves(rank: int) -> Tensor:
        return torch.full((4,), 4 * large if rank < num_ranks // 2 else -4 * large)

    def nearly_all(rank: int) -> Tensor:
        return torch.full((4,), large if rank % 2 else 0.0)

    return {"alternating": alternating, "one": one, "halves": halves, "half of them": nearly_all}


@pytest.mark.parametrize("num_ranks", [1000, 1024])
@pytest.mark.parametrize(
    "codec", [Half(torch.float16), Half(torch.bfloat16), BlockInt8(4)], ids=["fp16", "bf16", "int8"]
)
@pytest.mark.parametrize("case", list(spread_out(2)))
def test_a_sum_in_fp32_overflows_on_no_number_of_ranks(codec: Codec, case: str, num_ranks: int) -> None:
    values = spread_out(num_ranks)[case]
    exact = sum(values(rank).double() for rank in range(num_ranks)) / num_ranks
    mean = exchanged_mean(codec, values, num_ranks).double()
    magnitude = sum(values(rank).double().abs() for rank in range(num_ranks)) / num_ranks
    lost = 1 / 254 if isinstance(codec, BlockInt8) else HALVES[codec.dtype]
    # each is rounded once on its way to the owner, and the mean once more; sums in FP32
    bound = (magnitude + exact.abs()) * lost * 1.01 + magnitude * num_ranks * 2.0**-24
    assert mean.isfinite().all()
    assert ((mean - exact).abs() <= bound).all()


@pytest.mark.parametrize("num_ranks", [1000, 1024])
def test_what_the_others_do_with_the_same_values(num_ranks: int) -> None:
    cases = spread_out(num_ranks)
    for values in cases.values():
        assert not hook_ring_mean(torch.float16, values, num_ranks).isfinite().all(), "casts before it divides"
    assert ring_mean(torch.float16, cases["alternating"], num_ranks).isfinite().all()
    assert not ring_mean(torch.float16, cases["halves"], num_ranks).isfinite().all(), "a sum on the wire can overflow"
