"""The operators that choose among kernels, on a GPU: what they compute, and which kernel they take."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import meshpar as mp
from meshpar.ops import experts
from meshpar.ops.blockwise import attend_, attend_backward_
from meshpar.ops.fused_attention import fused_attention_for
from meshpar.ops.pairings import Pairing, Stretch
from meshpar.ops.tiles import Scoring, nothing_yet, wide
from tests.gpu.small import batch_of, each_rank, expected, farthest, model_of

pytestmark = pytest.mark.gpu


def names(step: object, device: torch.device) -> list[str]:
    """The operators and kernels that ran."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        step()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
    return [event.name for event in found.events() or ()]


@pytest.mark.parametrize("width", [48, 52], ids=["rows of 16 bytes", "other rows"])
def test_products_of_experts(width: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(60, 32, device=device).bfloat16(), torch.randn(4, 32, width, device=device).bfloat16()
    ends = torch.tensor([13, 13, 40, 60], dtype=torch.int32, device=device)
    parts = [x[a:b].float() @ w[i].float() for i, (a, b) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist()))]
    torch.testing.assert_close(experts.grouped_mm(x, w, ends).float(), torch.cat(parts), rtol=2e-2, atol=2e-1)
    y = torch.randn(60, width, device=device).bfloat16()
    outer = [x[a:b].float().t() @ y[a:b].float() for a, b in zip([0, *ends[:-1].tolist()], ends.tolist())]
    torch.testing.assert_close(experts.grouped_outer(x, y, ends).float(), torch.stack(outer), rtol=2e-2, atol=2e-1)


def test_products_of_experts_are_one_kernel(device: torch.device) -> None:
    x, w = torch.randn(64, 32, device=device).bfloat16(), torch.randn(4, 32, 48, device=device).bfloat16()
    ends = torch.tensor([16, 32, 48, 64], dtype=torch.int32, device=device)
    ran = names(lambda: experts.grouped_mm(x, w, ends), device)
    assert device.type == "cpu" or any("_grouped_mm" in name for name in ran), ran


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_flash_attention(padded: bool, device: torch.device) -> None:
    """Of a causal model in bfloat16, at a length where scores would not fit; also where a batch has a mask of ones."""
    model, batch = model_of("llama", device, torch.bfloat16), batch_of(device, 1, 2048 if device.type == "cuda" else 64)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    pm = mp.parallelize(model, mp.make_mesh("tp=1", device.type), example=batch)
    pm.train_step(**batch)
    ran = names(lambda: pm.train_step(**batch), device)
    own = names(lambda: model_of("llama", device, torch.bfloat16)(**batch, use_cache=False).loss.backward(), device)
    fused = ("flash", "fmha", "cudnn")
    if device.type == "cuda" and any(word in name.lower() for name in own for word in fused):
        assert any(word in name.lower() for name in ran for word in fused)


def test_ring_attention(device: torch.device) -> None:
    """Simulated ranks against one: values and gradients of a causal attention whose keys travel."""
    batch = batch_of(device, 2, 128)
    loss, right = expected(model_of("llama", device, torch.float32), batch)
    for context in ("ring", "heads", "gather"):
        with mp.simulate(2):
            mesh = mp.make_mesh("cp=2", device.type)
            config = mp.ParallelConfig(context=context)
            pm = mp.parallelize(model_of("llama", device, torch.float32), mesh, example=batch, config=config)
            assert max(abs(float(one) - loss) for one in each_rank(pm.train_step(**batch))) < 1e-4 * loss, context
            assert farthest(pm, right) < 1e-3, context


class Classifies(nn.Module):
    """A projection to many classes and its loss."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, 64, bias=False, dtype=torch.float64).to(device)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def test_cross_entropy_over_a_cut_vocabulary(device: torch.device) -> None:
    torch.manual_seed(1)
    batch = {"x": torch.randn(32, 16, dtype=torch.float64).to(device), "labels": torch.randint(64, (32,)).to(device)}
    model = Classifies(device)
    loss = model(**batch)["loss"]
    loss.backward()
    with mp.simulate(2):
        pm = mp.parallelize(Classifies(device), mp.make_mesh("tp=2", device.type), example=batch, rules={"head.weight": "tp:0"})
        assert max(abs(float(one) - float(loss)) for one in each_rank(pm.train_step(**batch))) < 1e-10
        assert farthest(pm, {"head.weight": model.head.weight.grad.cpu()}) < 1e-10  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv", [4, 2])
def test_rings_take_a_fused_kernel(dtype: torch.dtype, kv: int, device: torch.device) -> None:
    """Where torch has one for such tensors it has shown that it computes what is asked of it, and is the one that runs."""
    q, k, v = (torch.randn(2, n, 192, 64, device=device, dtype=dtype) for n in (4, kv, kv))
    whole = Pairing((Stretch(0, 0, 96), Stretch(96, 288, 96)), (Stretch(0, 0, 96), Stretch(96, 288, 96)))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that is not exact
        for backends in (list(SDPBackend.__members__.values()), [SDPBackend.MATH]):
            with sdpa_kernel([one for one in backends if one != SDPBackend.ERROR]):
                out, norm = nothing_yet(q, 64)
                attend_(q, k, v, [], whole.numbers, Scoring(True, None, 0.125).written, out, norm)
                sums = [wide(torch.zeros_like(x)) for x in (q, k, v)]
                rest = torch.ones_like(q), out.to(dtype), norm, out.sum(-1), *sums
                attend_backward_(q, k, v, [], whole.numbers, Scoring(True, None, 0.125).written, *rest, [])
                found.append([out, norm.sum(-1), *sums])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 2e-4)
    assert fused_attention_for(q, k, v) is not None or (dtype == torch.float32 and kv != 4 and device.type == "cuda")
