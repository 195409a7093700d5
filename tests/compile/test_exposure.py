"""What of communication is waited for, by the constants of a machine: of collectives in a lowered graph, and in words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import meshpar as mp
from meshpar.compile.ledger import ledger
from meshpar.compile.priced import price_of
from meshpar.passes import order
from meshpar.passes.pieces import CutIntoPieces
from meshpar.passes.products import HideGradientSums
from meshpar.plan import Comm
from meshpar.planner.hardware import hardware
from meshpar.planner.measured import Curve, Measured
from meshpar.report.traffic import waited_for
from meshpar.sharding.beside import Covers, arriving, leaving, rest
from meshpar.sharding.price import Price
from tests.models import text, tiny


def test_parts_that_arrive_or_leave() -> None:
    def waited(covers: Covers) -> float:
        return rest(covers, 1.0, Price(flops=1.0))

    assert waited(arriving(0.0, 4)) == 1.0 and waited(arriving(1.0, 4)) == pytest.approx(0.25) and waited(arriving(2.0, 4)) == 0.0
    assert waited(arriving(1.0, 8)) == pytest.approx(0.125), "of the last message alone nothing is multiplied beside it"
    assert waited(arriving(0.5, 2, left=0.5)) == pytest.approx(0.25)
    assert waited(leaving(0.0, 4, 4)) == 1.0
    assert waited(leaving(4.0, 4, 4)) == pytest.approx(0.25), "the last of four parts is computed before it leaves"
    assert waited(leaving(4.0, 3, 4)) == 0.0, "the own part is computed after the last one left"


@pytest.fixture(params=[True, False])
def pm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> mp.ParallelModel:
    monkeypatch.setattr(order, "HideGradientSums", partial(HideGradientSums, least_bytes=0))
    monkeypatch.setattr(order, "CutIntoPieces", partial(CutIntoPieces, least_bytes=0))
    with mp.simulate(2):
        config = mp.ParallelConfig(sequence_parallel=request.param)
        return mp.parallelize(tiny("llama"), mp.make_mesh("tp=2"), example=text(), config=config)


def waits(pm: mp.ParallelModel, price: Price) -> dict[tuple[str, str], float]:
    """The share that is waited for of what the blocks send."""
    found: dict[tuple[str, str], list[Comm]] = {}
    for comm in ledger(pm._first.graph, price):
        if comm.region and comm.nbytes > 2000:
            found.setdefault((comm.kind, comm.phase), []).append(comm)
    return {key: sum(c.exposed for c in comms) / sum(c.seconds for c in comms) for key, comms in found.items()}


@pytest.mark.sweep(1)
def test_the_slower_a_rank_computes_the_less_it_waits(pm: mp.ParallelModel) -> None:
    fast, slow = (waits(pm, replace(Price(), flops=flops, latency=0.0)) for flops in (1e30, 1e3))
    assert set(fast) == set(slow) and all(share == pytest.approx(1.0) for share in fast.values())
    late = {("all_reduce", "forward"): 0.25}  # the last piece of a sum
    assert slow == pytest.approx({key: late.get(key, 0.0) for key in slow}, abs=1e-6)


def test_rings_send_beside_attention() -> None:
    """All but what comes home after the last step of backward: 1 of 5 messages on 3 ranks."""
    with mp.simulate(3):
        config = mp.ParallelConfig(context="ring")
        pm = mp.parallelize(tiny("llama"), mp.make_mesh("cp=3"), example=text(length=18), config=config)

    def shares(flops: float) -> dict[str, float]:
        sent = [c for c in ledger(pm._first.graph, replace(Price(), flops=flops, latency=0.0)) if c.kind == "ring"]
        assert {c.phase for c in sent} == {"forward", "backward"}
        return {
            phase: sum(c.exposed for c in sent if c.phase == phase) / sum(c.seconds for c in sent if c.phase == phase)
            for phase in ("forward", "backward")
        }

    assert shares(1e30) == pytest.approx({"forward": 1.0, "backward": 1.0})
    assert shares(1e3) == pytest.approx({"forward": 0.0, "backward": 0.2})


def test_what_is_said() -> None:
    one = Comm("all_reduce", "tp", "forward", 1000.0, 2, "p_to_i", "", "", 0, 0.002, 0.0005)
    assert one.exposed_bytes == 250.0 and Comm("send", "pp", "forward", 10.0, 1, "x", "", "").exposed_bytes == 10.0
    assert (
        waited_for([one])[0] == "  tp: 4 ms of communication, 3 ms of it beside computation; 1 ms are waited for (25 %; 500 B of 1.95 KiB)"
    )


def test_the_constants_of_a_machine() -> None:
    assert price_of(None, None, 8) == Price()
    h100 = price_of(hardware("h100"), torch.bfloat16, 8)
    assert h100.flops == pytest.approx(Price().flops, rel=0.02) and h100.as_is and h100.at_scale(1.0) is h100
    curves = {"matrix fp32": Curve((1e6,), (1e-4,)), "elementwise": Curve((1e3, 1e6), (1e-6, 1e-3))}
    sums = {"all_gather 2 of 4": Curve((1e3, 1e6), (1e-4, 1.1e-3)), "send 2 of 4": Curve((1e3,), (1.0,))}
    here = replace(hardware("h100"), measured=Measured(2, (1.0, 2.0), curves, sums))
    price = price_of(here, torch.float64, 2)
    assert (price.flops, price.memory, price.latency) == pytest.approx((5e9, 5e8, 1e-4)) and price.link == pytest.approx(1e9)


def test_sequences_are_cut_where_that_costs_less_on_the_machine() -> None:
    """Twice as many messages against half of the work between products: worth it where messages cost nothing, not where they cost much."""
    found = {}
    for name, latency in (("quick", 1e-9), ("slow", 1.0)):
        curves = {"matrix fp32": Curve((1e6,), (1e-4,)), "elementwise": Curve((1e3, 1e6), (1e-6, 1e-3))}
        sums = {"all_gather 2 of 2": Curve((1e3, 1e9), (latency, latency + 1e-4))}
        machine = replace(hardware("h100"), name=name, measured=Measured(2, (1.0, 1.0), curves, sums))
        with mp.simulate(2):
            config = mp.ParallelConfig(hardware=machine)
            pm = mp.parallelize(tiny("llama"), mp.make_mesh("tp=2"), example=text(), config=config)
        assert pm.plan.options["hardware"] == name
        found[name] = any(c.kind == "reduce_scatter" and c.phase == "forward" for c in pm.comms())
    assert found == {"quick": True, "slow": False}


def test_hardware_that_is_none() -> None:
    with pytest.raises(mp.ConfigError, match="no accelerator 'h10'"):
        mp.ParallelConfig(hardware="h10")  # type: ignore[arg-type]
    with pytest.raises(mp.ConfigError, match="hardware=3: the name of an accelerator"):
        mp.ParallelConfig(hardware=3)  # type: ignore[arg-type]
