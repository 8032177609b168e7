"""The claims of a step, counted: one control collective, no wait for the device, two passes over the gradients."""

import pytest

from benchmarks.common import run_ranks
from benchmarks.step_counts import STRATEGIES, all_counts

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def counts_of_ranks():
    return run_ranks(2, all_counts)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("who", "probe_passes"), [("ours", 0), ("ours, attributing overflows", 1)])
def test_a_step_makes_one_control_collective_no_wait_and_two_passes(counts_of_ranks, strategy, who, probe_passes):
    for found in counts_of_ranks:
        counts = found[strategy, who]
        assert counts.control_collectives == 1
        assert counts.host_syncs == 0
        assert counts.gradient_passes == pytest.approx(2, abs=0.01)
        # Attribution reads the gradients a third time, before the wire. Shards may be padded a little.
        assert counts.probe_passes == pytest.approx(probe_passes, abs=0.05)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_more_crosses_the_wire_than_by_hand(counts_of_ranks, strategy):
    engine, hand = counts_of_ranks[0][strategy, "ours"], counts_of_ranks[0][strategy, "by hand"]
    assert engine.gradient_collectives <= hand.gradient_collectives
    assert engine.gradient_bytes <= hand.gradient_bytes


def test_the_counter_finds_the_waits_and_passes_of_a_loop_by_hand(counts_of_ranks):
    counts = counts_of_ranks[0]["ddp", "by hand"]
    assert counts.host_syncs == 1  # the loss
    assert counts.gradient_passes == pytest.approx(4, abs=0.01)  # unscale, norm, clip, step
