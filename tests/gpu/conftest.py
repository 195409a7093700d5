"""Where tests marked gpu run, and the models that they run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    found = torch.device(request.config.getoption("--gpu-on"))
    if found.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    return found
