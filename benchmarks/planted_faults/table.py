"""Which faults are planted in which models, on which meshes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from benchmarks.planted_faults.faults import (
    Fault,
    alone_draws,
    argument,
    bounds,
    double,
    doubled,
    drop,
    exchanged,
    extra,
    factor,
    group,
    keyword,
    late,
    lost_step,
    named,
    no_sinks,
    of_sinks,
    operand,
    other_dim,
    other_keys,
    other_sinks,
    other_weights,
    parameter,
    same_draws,
    segments,
    stale_step,
    summed_again,
    swap,
    transposed,
    turned,
)
from meshpar.config import ParallelConfig

Made = tuple[nn.Module, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model on a mesh, and the faults planted in its program."""

    name: str
    make: Callable[[], Made]
    mesh: str
    faults: Sequence[Fault]
    config: ParallelConfig = field(default_factory=ParallelConfig)
    eager: bool = False
    """Whether passes that are for megabytes take what is small."""


def _tiny(name: str, samples: int = 8, length: int = 16, **changes: Any) -> Callable[[], Made]:
    def make() -> Made:
        from tests.models import text, tiny

        return tiny(name, **changes), text(samples, length)

    return make


def _plain(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from tests.models import plain

        return plain(name)

    return make


_SEQUENCE = [
    drop("p_to_s", 1), drop("s_to_r", 1), drop("i_to_r_many"), double("p_to_s"), double("s_to_r"), swap("s_to_r", "s_to_i"),
    swap("p_to_s", "r_to_s"), segments("p_to_s"), segments("s_to_r"), other_dim("p_to_s", 1), other_dim("s_to_r", 1), late("p_to_s"),
    operand("linear", 4), operand("mul", 12), parameter(1), bounds(), transposed(1),
    named(exchanged("scaled_dot_product_attention", 1, 2), "keys and values exchanged"),
    named(argument("scaled_dot_product_attention", 5, False), "attention that is not causal"),
    argument("embedding", 5, ((65, 1), (66, 1))), keyword("cross_entropy", "ignore_index", -1), argument("embedding", 2, 1),
]  # fmt: skip
_PLAIN = [
    drop("p_to_i", 1), drop("i_to_r", 1), double("p_to_i"), double("i_to_r", 1), swap("i_to_r", "r_to_i", 1), swap("p_to_i", "i_to_r"),
    late("p_to_i"), extra("p_to_i", "layer_norm"), extra("i_to_r", "layer_norm", 1), operand("linear", 5), parameter(2),
]  # fmt: skip
_DATA = [
    drop("p_to_i"), drop("p_to_i", 1), double("p_to_i"), group("p_to_i"), group("p_to_s", 1), group("s_to_r", 2), swap("p_to_i", "i_to_r"),
    named(extra("i_to_r", "mul", 3), "a gradient summed once too often"), factor(0), factor(0, 0.5),
]  # fmt: skip
_DRAWS = [alone_draws(0), alone_draws(1), alone_draws(2), same_draws()]
_EXPERTS = [
    group("send_rows"), group("return_rows"), named(operand("return_rows", 1, 1), "rows go back the way of another layer"),
    named(operand("return_rows", 1, 2), "rows come back in the order of another layer"), operand("combine", 1, 1),
    operand("grouped_mm", 1, 2),
    operand("combine", 0, 2), parameter(3), named(drop("p_to_i"), "router losses over no axis"),
    named(group("p_to_i"), "router losses over another axis"), drop("i_to_r_many"), double("s_to_i"), drop("r_to_i"),
    named(extra("p_to_i", "combine"), "experts' results summed once too often"),
]  # fmt: skip
_CONTEXT = [
    drop("s_to_r"), swap("s_to_r", "s_to_i"), double("s_to_r"), segments("gathered_attention"), segments("i_to_s"), segments("s_to_r"),
    named(bounds(), "labels that are not shifted"), operand("gathered_attention", 1, 1), exchanged("gathered_attention", 1, 2),
    drop("p_to_i"), group("i_to_s"), operand("linear", 4), swap("i_to_s", "r_to_s"), keyword("gathered_attention", "window", 4),
    other_keys(),
]  # fmt: skip
_RING = [
    segments("ring_attention"), keyword("ring_attention", "causal", False), exchanged("ring_attention", 1, 2),
    operand("ring_attention", 1, 1),
    keyword("ring_attention", "scale", 1.0), drop("p_to_i"),
]  # fmt: skip
_PIECES = [
    turned("ring_attention"), turned("i_to_s"), segments("ring_attention"), segments("i_to_s"),
]  # fmt: skip
_SINKS = [
    no_sinks(), other_sinks(), of_sinks(doubled, "sinks that are twice as large"),
    of_sinks(summed_again(0), "the gradient of sinks summed over cp once too often"),
    of_sinks(summed_again(1), "the gradient of sinks summed over tp, which cuts them"), drop("i_to_r_many"), parameter(0),
]  # fmt: skip
_KEPT_LESS = [
    stale_step(), stale_step(2), lost_step(), operand("computed", 2, 1), operand("computed", 3, 2), group("gathered"), segments("gathered"),
    operand("gathered", 1, 0), other_weights("gathered"), argument("gathered", 3, 0), group("scattered"), segments("scattered"),
    operand("scattered", 1, 0), argument("scattered", 2, 0),
    named(keyword("cross_entropy", "ignore_index", -1), "a loss in chunks that counts padding"),
    keyword("cross_entropy", "label_smoothing", 0.1), argument("cross_entropy", 7, ((66, 1), (66, 1))), group("cross_entropy"),
    operand("cross_entropy", 0, 1),
]  # fmt: skip
_IN_PIECES = [
    group("through_experts"), operand("through_experts", 1, 3), operand("through_experts", 1, 4), operand("through_experts", 1, 1),
    stale_step(op="through_experts"), lost_step("through_experts"), operand("combine", 1, 1),
]  # fmt: skip
_BESIDE_TOKENS = [
    group("on_gathered_tokens"), operand("on_gathered_tokens", 1, 1), operand("on_gathered_tokens", 1, 2),
    operand("on_gathered_tokens", 1, 3), operand("on_gathered_tokens", 1, 5), operand("on_gathered_tokens", 1, 6),
    keyword("on_gathered_tokens", "repeat", 1), keyword("on_gathered_tokens", "num_experts", 3),
    keyword("on_gathered_tokens", "segments", ((6, 2),)), stale_step(op="on_gathered_tokens"), lost_step("on_gathered_tokens"),
    named(drop("s_to_r", 1), "experts are chosen for a rank's own tokens"), named(segments("s_to_r", 1), "choices of other tokens"),
]  # fmt: skip
_STAGES = [
    named(operand("linear", 2), "a stage reads a stale value"), named(bounds(), "labels that are not shifted"), drop("p_to_i"),
    drop("i_to_r_many"), drop("s_to_r"), double("p_to_s"), parameter(1), group("p_to_s"), factor(0),
    named(argument("scaled_dot_product_attention", 5, False), "attention that is not causal"),
]  # fmt: skip

_OSS = _tiny("gpt_oss", num_local_experts=4, head_dim=16, num_experts_per_tok=2)

CASES: tuple[Case, ...] = (
    Case("llama", _tiny("llama"), "tp=2", _SEQUENCE),
    Case("gpt2", _tiny("gpt2"), "tp=2", _PLAIN, ParallelConfig(sequence_parallel=False)),
    Case("gpt (fused, tied)", _plain("gpt_kv2"), "tp=2", [*_PLAIN[:6], bounds(), parameter(1), factor(0), transposed(0)],
         ParallelConfig(sequence_parallel=False)),
    Case("gpt (dropout)", _plain("gpt_dropout"), "dp=2,tp=2", _DRAWS),
    Case("llama", _tiny("llama"), "dp=2,tp=2", _DATA),
    Case("batch norm", _plain("batch_norm"), "dp=2", [drop("p_to_i"), drop("p_to_i", 1), factor(0), factor(1), double("p_to_i", 1)]),
    Case("contrastive", _plain("contrastive"), "dp=2", [drop("s_to_i"), drop("s_to_r"), swap("s_to_r", "s_to_i"), factor(0)]),
    Case("encoder and decoder", _plain("encoder_decoder"), "dp=2,tp=2", [*_SEQUENCE[:9], operand("linear", 6)]),
    Case("mixtral", _tiny("mixtral"), "ep=2,tp=2", _EXPERTS),
    Case("mixtral (in pieces)", _tiny("mixtral"), "ep=2", _IN_PIECES, eager=True),
    Case("mixtral (beside tokens)", _tiny("mixtral"), "tp=2", _BESIDE_TOKENS, ParallelConfig(sequence_parallel=True), eager=True),
    Case("llama", _tiny("llama"), "cp=2,tp=2", _CONTEXT),
    Case("llama (ring)", _tiny("llama"), "cp=2,tp=2", _RING, ParallelConfig(context="ring")),
    Case("llama (four pieces a rank)", _tiny("llama"), "cp=2,tp=2", _PIECES, ParallelConfig(context="ring", context_chunks=4)),
    Case("gpt-oss (sinks)", _OSS, "cp=2,tp=2", _SINKS, ParallelConfig(context="ring")),
    Case("gpt-oss (sinks, gathered)", _OSS, "cp=2,tp=2", _SINKS[:5], ParallelConfig(context="gather")),
    Case("llama (kept less)", _tiny("llama", vocab_size=132), "dp=2,tp=2", _KEPT_LESS, ParallelConfig(logits_bytes=400), eager=True),
    Case("llama", _tiny("llama"), "pp=2,dp=2,tp=2", _STAGES, ParallelConfig(microbatches=2)),
)  # fmt: skip
