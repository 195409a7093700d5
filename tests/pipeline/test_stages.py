"""`mp.pipeline.split`: stages as plain modules, alone and under torch's own schedules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import meshpar as mp
from meshpar.errors import BatchError, ConfigError
from tests.compile.staged import model_of
from tests.models import plain, text
from tests.pool import Pool

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def step(stages: tuple[mp.pipeline.Stage, ...], batch: Mapping[str, Tensor]) -> Tensor:
    """One microbatch through all stages in this process, forward and backward."""
    handed: tuple[Tensor, ...] = ()
    for stage in stages:
        handed = stage(*handed, **batch)
    assert isinstance(handed, Tensor) and handed.shape == (1,)
    handed.backward()
    return handed.detach().squeeze()


def expected(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    output = model(**batch)
    loss = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@lru_cache(maxsize=1)
def halves() -> tuple[dict[str, Tensor], mp.pipeline.Stage, mp.pipeline.Stage]:
    """A batch, and a tied llama in two stages."""
    model, batch = model_of("llama_tied")
    first, second = mp.pipeline.split(model, batch, 2)
    return batch, first, second


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", ["llama_tied", "t5", "albert", "unet", "uneven"])
def test_stages_in_one_process(name: str) -> None:
    model, batch = model_of(name)
    loss, grads = expected(model, batch)
    stages = mp.pipeline.split(model, batch, 3)
    torch.manual_seed(3)
    torch.testing.assert_close(step(stages, batch), loss, **EXACT)
    for fqn, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[fqn], **EXACT, msg=fqn)  # the stages hold the model's own


def test_names_are_the_originals_and_tied_parameters_are_on_every_stage_that_uses_them() -> None:
    model, batch = model_of("llama_tied")
    stages = mp.pipeline.split(model, batch, 3, where=[1, 1, 1])
    states = [stage.state_dict() for stage in stages]
    assert set().union(*states) == set(model.state_dict())
    assert [{n.split(".")[2] for n in state if "layers" in n} for state in states] == [{"0"}, {"1"}, {"2"}]
    for stage, state in zip(stages, states):
        assert ("model.embed_tokens.weight" in state) == ("lm_head.weight" in state) == (stage.index != 1)
        for fqn, parameter in stage.named_parameters():
            assert parameter is model.get_parameter(fqn)
    assert {name: users for name, (users, _, _) in stages[1].shared_parameters.items()} == {"model.embed_tokens.weight": (0, 2)}


def test_buffers_are_updated_and_keep_their_persistence() -> None:
    model, batch = model_of("unet")
    eager = copy.deepcopy(model)
    eager(**batch)
    stages = mp.pipeline.split(model, batch, 2)
    step(stages, batch)
    for fqn, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, eager.get_buffer(fqn), **EXACT, msg=fqn)
    assert set().union(*(stage.state_dict() for stage in stages)) == set(model.state_dict())
    llama, batch = model_of("llama_tied")
    (only,) = mp.pipeline.split(llama, batch, 1)
    assert list(only.state_dict()) == list(llama.state_dict()), "rotary frequencies are not saved"


def test_modules_called_like_attributes_of_a_stage() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_parameters, self.inputs = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inputs(self.shared_parameters(x).relu())

    model = Net()
    first, second = mp.pipeline.split(model, torch.randn(2, 4), 2, where=["inputs"])
    assert first.get_parameter("shared_parameters.weight") is model.shared_parameters.weight
    assert second.inputs == () and second.get_submodule("inputs").weight is model.inputs.weight


def test_graph_modules_of_torch() -> None:
    """Any module will do: one that torch.fx traced, with its own names."""
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).double()
    traced, x = fx.symbolic_trace(net), torch.randn(6, 4, dtype=torch.float64)
    stages = mp.pipeline.split(traced, x, 3, loss_fn=lambda output, batch: output.square().mean())
    loss = step(stages, {"input": x})
    grads = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).square().mean().backward()
    torch.testing.assert_close(loss, net(x).square().mean().detach(), **EXACT)
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, **EXACT)
    assert set().union(*(stage.state_dict() for stage in stages)) == set(traced.state_dict())


def test_what_is_not_used_is_kept_by_the_first_stage() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.spare, self.two = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    first, second = mp.pipeline.split(Net(), torch.randn(2, 4), 2, where=["two"])
    assert list(first.state_dict()) == ["one.weight", "one.bias", "spare.weight", "spare.bias"]
    assert list(second.state_dict()) == ["two.weight", "two.bias"]


def test_without_a_loss_the_outputs_come_out() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    first, second = mp.pipeline.split(model, x, 2)
    torch.testing.assert_close(second(*first(x)), model(x), rtol=0, atol=0)
    assert [t.shape for t in second.output_args] == [(8, 2)]
    with_loss = mp.pipeline.split(model, (x,), 2, loss_fn=lambda output, batch: output.pow(2).mean())
    torch.testing.assert_close(with_loss[1](*with_loss[0](x)), model(x).pow(2).mean().reshape(1), rtol=0, atol=0)


def test_examples_describe_what_is_handed_on() -> None:
    batch, first, second = halves()
    assert first.input_args == () and first.sends == second.receives
    (sent,), (received,) = first.output_args, second.input_args
    assert sent.shape == received.shape == (2, 6, 64) and sent.device.type == "meta" and sent.requires_grad and received.requires_grad
    (value,) = first(**batch)
    assert value.shape == sent.shape and value.dtype == sent.dtype and value.is_contiguous()


def test_explain_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, stage = halves()
    said = stage.explain()
    assert said.startswith("2 stages, balanced by cost")
    assert "stage 1 of 2:\n  receives " in said and "[2, 6, 64] float64" in said
    assert "reads labels of the batch" in said and "shares model.embed_tokens.weight with stage 0" in said
    assert stage.print_readable().startswith("# root") and capsys.readouterr().out.startswith("# root")


def test_errors() -> None:
    model, batch = model_of("llama_tied")
    first, second = mp.pipeline.split(model, batch, 2)
    with pytest.raises(
        BatchError, match=r"stage 0:\n  'inputs_ids' is no tensor of the batch. Did you mean input_ids\?\n  it reads 'input_ids'"
    ):
        first(inputs_ids=batch["input_ids"])
    with pytest.raises(BatchError, match=r"stage 1:\n  it receives 1 values \(.*\), but 0 were given."):
        second(**batch)
    with pytest.raises(BatchError, match=r"'input_ids' has shape \[1, 6\]; a microbatch of the example has \[2, 6\]."):
        first(input_ids=batch["input_ids"][:1])
    with pytest.raises(BatchError, match="another structure"):
        first.keywords(batch["input_ids"])
    in_another_order = {name: batch[name] for name in reversed(batch)}
    assert first.keywords(**in_another_order).keys() == first.keywords(**batch).keys() == set(first.inputs)
    with pytest.raises(ConfigError, match="not a set|not set"):
        mp.pipeline.split(nn.Linear(2, 2), {1, 2}, 2)  # type: ignore[arg-type]


# -- torch's schedules ---------------------------------------------------------------------------------------------------------------------


def uneven(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and four samples, of which one ignores all its labels and others some."""
    if name != "t5":
        model, batch = plain(name)
        return model.double(), batch
    batch = text(4, 6)
    batch["labels"][2, 1:] = -100
    return model_of("t5")[0], batch


def trained(name: str, schedule: str, world: int) -> tuple[float, dict[str, Tensor]]:
    """One step on this rank's stages: the sum of the losses, and the gradients by name."""
    model, batch = uneven(name)
    rank, count = dist.get_rank(), 2 * world if schedule == "interleaved" else world
    stages = mp.pipeline.split(model, batch, count, microbatches=4)
    mine = [stages[i] for i in range(rank, count, world)]
    runs = [PipelineStage(s, s.index, count, torch.device("cpu"), input_args=s.input_args, output_args=s.output_args) for s in mine]
    options: dict[str, Any] = {"loss_fn": mp.pipeline.loss, "scale_grads": False}
    made: Any = {
        "gpipe": lambda: ScheduleGPipe(runs[0], 4, **options),
        "1f1b": lambda: Schedule1F1B(runs[0], 4, **options),
        "interleaved": lambda: ScheduleInterleaved1F1B(runs, 4, **options),
    }[schedule]()
    keywords: dict[str, Tensor] = {}
    for stage in mine:
        keywords |= stage.keywords(**batch)
    losses: list[Tensor] = []
    for _ in range(2):  # the second step adds to the gradients of the first
        losses.clear()
        made.step(target=mine[-1].step_target, losses=losses, return_outputs=False, **keywords)
    mp.pipeline.sum_shared_gradients(mine)
    own = {n for stage in mine for n in stage.state_dict()}
    total = float(sum(losses)) if rank == world - 1 else 0.0
    return total, {n: p.grad / 2 for n, p in model.named_parameters() if n in own and p.grad is not None}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("name", "schedule"), [("gpt", "1f1b"), ("t5", "gpipe"), ("gpt", "interleaved")])
def test_under_a_schedule_of_torch(gloo: Pool, name: str, schedule: str) -> None:
    model, batch = uneven(name)
    loss, grads = expected(model, batch)
    results = gloo.run(trained, name, schedule, 2, world=2)
    exact = {"rtol": 1e-12, "atol": 1e-14} if name == "gpt" else {"rtol": 1e-5, "atol": 1e-7}  # transformers' t5 norms in float32
    torch.testing.assert_close(torch.tensor(results[1][0], dtype=loss.dtype), loss, **exact)
    found: dict[str, Tensor] = {}
    for _, part in results:
        for fqn, grad in part.items():
            if fqn in found:
                torch.testing.assert_close(grad, found[fqn], rtol=0, atol=0)  # shared: the same on both ranks
            found[fqn] = grad
    assert set(found) == set(grads)
    for fqn, grad in grads.items():
        torch.testing.assert_close(found[fqn], grad, **exact, msg=fqn)


def test_a_mean_of_means_would_be_wrong() -> None:
    """The labels are uneven enough that the test above could not pass without the count of the whole batch."""
    model, batch = uneven("gpt")
    loss, _ = expected(model, batch)
    parts = [{n: x[i : i + 1] for n, x in batch.items()} for i in (0, 2, 3)]  # sample 1 has no label
    assert abs(sum(float(expected(model, part)[0]) for part in parts) / 3 - float(loss)) > 1e-3
