"""Dimensions that several tests of the planner use."""

from __future__ import annotations

from meshpar.planner import Cluster, Job, Latent, Transformer

GPT = Transformer(96, 12288, 96, 4 * 12288, 51200, gated=False, tied=True, positions=2048)
"""175B of arXiv 2104.04473 and 2205.05198."""
LARGE = Transformer(80, 8192, 64, 28672, 128256, kv_heads=8)
"""70B, gated, grouped heads."""
SMALL = Transformer(32, 4096, 32, 14336, 128256, kv_heads=8)
"""8B."""
EXPERTS = Transformer(32, 4096, 32, 14336, 32000, kv_heads=8, experts=64, top_k=8, expert_ffn=2048)
LATENT = Transformer(
    *(61, 7168, 128, 18432, 129280),
    experts=256,
    top_k=8,
    expert_ffn=2048,
    shared_ffn=2048,
    dense_layers=3,
    latent=Latent(1536, 512, 128, 64, 128),
    predicts=1,
)
"""671B with latent attention, a shared expert and a block that predicts one token more."""


def job(model: Transformer = LARGE, part: str = "h100", gpus: int = 64, seq: int = 8192, batch: int = 128, **more: str) -> Job:
    return Job(model, Cluster(part, gpus), seq, batch, **more)  # type: ignore[arg-type]
