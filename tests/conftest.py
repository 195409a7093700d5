"""Fixtures every test may use: `gloo`, a pool of real ranks, and `simulated`, all ranks in this process; and what a run leaves out.

A sweep, which is a test of many cases that take long together, runs a sample of them; with `--every-case`, or named by its id, all.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.pool import Pool
from tests.sampling import left_out

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share few cores


def pytest_addoption(parser: pytest.Parser) -> None:
    with suppress(ValueError):  # pytest-timeout's, when it is installed
        parser.addini("timeout", "seconds per test (needs pytest-timeout; the pool of ranks has its own limit)")
    parser.addoption("--every-case", action="store_true", help="every case of every sweep, and the tests marked slow")
    parser.addoption("--gpu-on", default="cuda", help="where tests marked gpu run: `cpu` tries the tests themselves, without a GPU")


def pytest_collection_finish() -> None:
    """What the imports made stays: the collector need not walk over half a million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every-case"):
        named = [argument.split("::", 1)[1] for argument in config.args if "::" in argument]
        left = left_out([item for item in items if not any(item.nodeid.split("::", 1)[1].startswith(name) for name in named)])
        if left:
            config.hook.pytest_deselected(items=[item for item in items if item in left])
            items[:] = [item for item in items if item not in left]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu or config.getoption("--gpu-on") != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What torch 2.12 is refused for is skipped there, with the words of the refusal."""
    result: Any = yield
    if call.excinfo is None or "shares parameters out over one axis" not in str(call.excinfo.value):
        return
    from meshpar._torch import shares_out_over_several

    if not shares_out_over_several():
        report = result.get_result()
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, str(call.excinfo.value)[:200])


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo.run(fn, *args, world=2)` runs a module-level function on gloo ranks and returns their results."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def simulated() -> Callable[[int], Any]:
    """`with simulated(4) as world:` runs all ranks in this process."""
    from meshpar.simulate import simulate

    return simulate


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """The same random numbers in every test, and no process group left behind (unless a wider fixture holds one)."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
    held = _has_process_group()
    yield
    if _has_process_group() and not held:
        sys.modules["torch.distributed"].destroy_process_group()


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # importing torch is left to the tests that need it
    return distributed is not None and distributed.is_initialized()
