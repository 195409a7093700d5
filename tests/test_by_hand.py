"""A sample of the models by hand of `benchmarks/architectures`, which has all of them and those of other packages."""

from __future__ import annotations

import pytest

import meshpar as mp
from benchmarks.architectures.packages import of


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("task", "kind"), [("text", "rwkv"), ("graph", "messages"), ("sound", "conformer"), ("clicks", "dlrm_max")])
def test_a_model_by_hand(task: str, kind: str) -> None:
    made = of("plain").made(task, kind)
    mp.verify(made.model, "dp=2,tp=2", made.batch, loss_fn=made.loss_fn, steps=1).raise_if_failed()


def test_every_case_is_made_and_has_a_loss() -> None:
    package = of("plain")
    for task in package.TASKS:
        for kind in package.kinds(task):
            made = package.made(task, kind)
            output = made.model(*made.batch) if isinstance(made.batch, tuple) else made.model(**made.batch)
            assert made.loss_fn is not None
            assert made.loss_fn(output, made.batch).dim() == 0, kind
