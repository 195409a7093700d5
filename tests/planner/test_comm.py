"""Times of collectives: what bounds them, and how groups lie on domains."""

from __future__ import annotations

import pytest

from meshpar.planner.comm import Fabric, RankGroup, place
from meshpar.planner.workload import AxisSpan

FABRIC = Fabric(link=400e9, nic=40e9, latency=0.0, hop=0.0)


def test_inside_a_domain_links_bound() -> None:
    assert FABRIC.seconds("all_reduce", RankGroup(8, 8), 8e9) == pytest.approx(2 * 7e9 / 400e9)


@pytest.mark.parametrize("inside, rate", [(1, 40e9), (4, 160e9), (8, 320e9), (16, 400e9)])
def test_between_domains_all_adapters_of_the_group_bound_until_links_do(inside: int, rate: float) -> None:
    assert FABRIC.seconds("all_gather", RankGroup(64, inside), 64e9) == pytest.approx(63e9 / rate)


def test_flat_rings_use_one_adapter() -> None:
    assert Fabric(400e9, 40e9, 0, 0, one_adapter=True).seconds("all_gather", RankGroup(64, 8), 64e9) == pytest.approx(63e9 / 40e9)


def test_small_messages_cost_latency_and_hops() -> None:
    fabric = Fabric(400e9, 40e9, latency=10e-6, hop=4e-6)
    assert fabric.seconds("all_gather", RankGroup(64, 8), 64) == pytest.approx(10e-6 + 63 * 4e-6, rel=1e-3)
    assert fabric.seconds("all_gather", RankGroup(8, 8), 8) == pytest.approx(10e-6, rel=1e-3)


def test_an_exchange_between_domains_leaves_by_each_ranks_own_adapter() -> None:
    assert FABRIC.seconds("all_to_all", RankGroup(64, 8), 64e9) == pytest.approx(56e9 / 40e9)


def test_copies_cross_once() -> None:
    plain, once = (FABRIC.seconds("all_to_all", RankGroup(64, 8), 64e9, copies) for copies in (1, 8))
    assert once == pytest.approx(plain * 8 * (1 - (7 / 8) ** 8) / 8)


def test_a_group_of_one_takes_nothing() -> None:
    assert FABRIC.seconds("all_reduce", RankGroup(1, 1), 1e9) == 0


@pytest.mark.parametrize(
    "axis, domain, inside",
    [(AxisSpan("tp", 8, 1), 8, 8), (AxisSpan("dp", 16, 8), 8, 1), (AxisSpan("dp", 64, 1), 72, 64), (AxisSpan("ep", 8, 2), 8, 4)],
)
def test_groups_lie_on_domains_by_stride(axis: AxisSpan, domain: int, inside: int) -> None:
    assert place(axis, domain).inside == inside


def test_measured_bus_bandwidth_of_the_ring_fabric() -> None:
    """All-gather of 256 MB on 8-GPU nodes, GB/s of bus bandwidth (nanotron playbook): within a factor of 1.6 over two decades."""
    from meshpar.planner import Constants, hardware, stack
    from meshpar.planner.cost import rates

    fabric = rates(hardware("h100-efa"), stack("nanotron"), Constants.default()).fabric
    for nodes, published in ((1, 250), (2, 185), (4, 119), (8, 69), (16, 55), (32, 28), (64, 11)):
        n = 8 * nodes
        found = 256e6 * (n - 1) / n / fabric.seconds("all_gather", RankGroup(n, 8), 256e6) / 1e9
        assert published / 1.6 < found < published * 1.6, (nodes, found)
