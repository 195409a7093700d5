"""The solver on a decoder of two equal blocks: what it chooses is Megatron's layout."""

from __future__ import annotations

from collections import Counter

import pytest

from meshpar.compile.ledger import ledger
from meshpar.errors import PlanError
from meshpar.graph.facts import facts
from meshpar.plan import Plan
from meshpar.sharding.types import I, Shard, Type, plain
from tests.sharding.models import HEADS, HIDDEN, VOCABULARY, WIDTH, captured, decided, lowered


@pytest.fixture(scope="module")
def plan() -> Plan:
    return decided(captured())


def _placed(plan: Plan, name: str) -> Type:
    return plan.parameters[name].placements["tp"]


def _forward(plan: Plan, region: str, **graph: object) -> Counter[str]:
    entries = ledger(lowered(captured(**graph), plan))  # type: ignore[arg-type]
    return Counter(c.kind for c in entries if c.region == region and c.phase == "forward")


@pytest.mark.parametrize("layer", [0, 1])
def test_columns_then_rows(plan: Plan, layer: int) -> None:
    for name, type_ in dict(
        q=plain(0, HIDDEN),
        k=plain(0, HIDDEN),
        v=plain(0, HIDDEN),
        o=plain(1, HIDDEN),
        gate=plain(0, WIDTH),
        up=plain(0, WIDTH),
        down=plain(1, WIDTH),
    ).items():
        assert _placed(plan, f"layers.{layer}.{name}.weight") == type_, name


def test_norms_are_whole(plan: Plan) -> None:
    assert {_placed(plan, n) for n in plan.parameters if "norm" in n} == {I}


def test_embedding_and_head_are_cut_by_vocabulary(plan: Plan) -> None:
    assert _placed(plan, "embed.weight") == plain(0, VOCABULARY)
    assert _placed(plan, "head.weight") == plain(0, VOCABULARY)


@pytest.mark.parametrize("region", ["layers.0", "layers.1"])
def test_a_block_gathers_and_scatters_its_sequence_twice(plan: Plan, region: str) -> None:
    assert _forward(plan, region) == {"all_gather": 2, "reduce_scatter": 2}


@pytest.mark.parametrize("region", ["layers.0", "layers.1"])
def test_without_sequence_a_block_has_two_all_reduces(region: str) -> None:
    assert _forward(decided(captured(), sequence=False), region) == {"all_reduce": 2}


def test_equal_blocks_get_equal_plans(plan: Plan) -> None:
    (axis,) = plan.axes
    nodes = [n for n in captured().graph.nodes if n.op == "call_function"]
    first, second = ([axis.nodes[n.name] for n in nodes if facts(n).region == r and n.name in axis.nodes] for r in ("layers.0", "layers.1"))
    assert first and first == second


def test_solving_again_gives_the_same(plan: Plan) -> None:
    again = decided(captured())
    assert again.axes == plan.axes and again.hash == plan.hash


def test_fused_projections_are_cut_by_segment() -> None:
    plan = decided(captured(2, True))
    assert _placed(plan, "layers.0.qkv.weight") == Shard(0, 1, ((HIDDEN, 1), (HIDDEN // 2, 1), (HIDDEN // 2, 1)))
    assert _placed(plan, "layers.0.gate_up.weight") == Shard(0, 1, ((WIDTH, 1), (WIDTH, 1)))
    assert _placed(plan, "layers.0.o.weight") == plain(1, HIDDEN)
    assert _forward(plan, "layers.1", kv=2, fused=True) == {"all_gather": 2, "reduce_scatter": 2}


def test_query_heads_are_cut_where_ranks_outnumber_key_and_value_heads() -> None:
    plan = decided(captured(2), HEADS)
    attention = [p for name, p in plan.axes[0].nodes.items() if "attention" in name]
    assert all(isinstance(t, Shard) for p in attention for t in p.outs)


def test_one_key_and_value_head_for_all_ranks() -> None:
    plan = decided(captured(1), HEADS)
    attention = [p for name, p in plan.axes[0].nodes.items() if "attention" in name]
    assert len(attention) == 2 and all(p.outs == (plain(1, HEADS),) for p in attention)


def test_one_rank_needs_no_plan() -> None:
    assert decided(captured(), 1).axes == ()


@pytest.mark.parametrize(("rule", "expected"), [("tp:1", plain(1, VOCABULARY)), ("replicate", I), ("tp:-2", plain(0, VOCABULARY))])
def test_a_rule_is_obeyed(rule: str, expected: Type) -> None:
    if rule == "tp:1":
        expected = plain(1, HIDDEN)
    plan = decided(captured(), rules={"head.weight": rule})
    assert _placed(plan, "head.weight") == expected
    assert plan.parameters["head.weight"].why == "rule"
    assert _placed(plan, "layers.0.q.weight") == plain(0, HIDDEN), "the rest is chosen as before"


def test_a_rule_for_many_is_obeyed_by_all() -> None:
    plan = decided(captured(), rules={"layers.*.gate.weight": "replicate"})
    assert [_placed(plan, f"layers.{i}.gate.weight") for i in (0, 1)] == [I, I]


def test_rules_that_cannot_be_met() -> None:
    with pytest.raises(PlanError) as error:
        decided(captured(), rules={"layers.*.gat.weight": "tp:0", "head.weight": "tp:2", "norm.weight": "columns"})
    text = str(error.value)
    assert "rule 'layers.*.gat.weight' matches no parameter." in text and "Did you mean layers.*.gate.weight" in text
    assert "rule 'head.weight': head.weight has shape [128, 32], it has no dim 2." in text
    assert """rule 'norm.weight': 'columns' is not "tp:DIM" (as in "tp:0") or "replicate".""" in text


def test_a_rule_says_which_sizes_would_do() -> None:
    with pytest.raises(PlanError, match=r"rule: tp=9 cannot cut dim 1 of head.weight \[128, 32\]; valid tp: 1, 2, 4, 8, 16, 32"):
        decided(captured(), 9, rules={"head.weight": "tp:1"})
