"""Models that do something for every name of a list: given in several orders, they are what processes make of a set of strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("full", "near", "chunk")
Names = Sequence[str]


class Base(nn.Module):
    """Two layers and what goes on around them. `order`: that of a loop over names."""

    def __init__(self, order: Names) -> None:
        super().__init__()
        self.order = tuple(order)
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def run(self, x: Tensor, tables: dict[str, Tensor]) -> Tensor:
        x = self.first(x)
        for layer, name in zip(self.layers, NAMES, strict=True):
            x = x + layer(x * tables[name]).tanh()
        return x


class Tables(Base):
    """Tables in a loop, each of several operators and of the same lines."""

    def forward(self, x: Tensor) -> Tensor:
        tables = {}
        for name in self.order:
            position = torch.arange(8, dtype=x.dtype) / len(name)
            tables[name] = position.cos() + position.sin()
        return self.run(x, tables).square().mean()


class Comprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: torch.full((8,), 1.0 + len(name), dtype=x.dtype).cumsum(0) for name in self.order}).square().mean()


class Branches(Base):
    """Other lines for every name."""

    def forward(self, x: Tensor) -> Tensor:
        tables = {}
        for name in self.order:
            if name == "full":
                tables[name] = torch.ones(8, dtype=x.dtype).cumsum(0)
            elif name == "near":
                table = torch.linspace(0, 1, 8, dtype=x.dtype)
                tables[name] = table.exp()
            else:
                tables[name] = x.mean(0)
        return self.run(x, tables).square().mean()


class OneLine(Base):
    """A line of several operators, made of each other, for one of the names only: no loop, though it looks like the turns of one."""

    def forward(self, x: Tensor) -> Tensor:
        tables = {}
        for name in self.order:
            scale = torch.ones(8, dtype=x.dtype)
            if name == "near":
                scale = ((x.mean(0) + 1).abs() / 2).log1p().exp()
            tables[name] = (x.amax(0) * len(name)).cos() * scale
        return self.run(x, tables).square().mean()


class Constants(Base):
    """Tensors made of Python numbers, which export lifts and numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: torch.tensor([float(len(name))] * 8, dtype=x.dtype) for name in self.order}).square().mean()


class Dropouts(Base):
    """Random operators that only their users tell apart."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: F.dropout(torch.ones(8, dtype=x.dtype), 0.5, self.training) for name in self.order}).square().mean()


class Shared(Base):
    """One module called in a loop: its calls are numbered by export."""

    def __init__(self, order: Names) -> None:
        super().__init__(order)
        self.table = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: self.table(x + len(name)) for name in self.order}).square().mean()


class Registered(Base):
    """Modules and buffers that are registered in the order of the names, as a rotary embedding registers its frequencies."""

    def __init__(self, order: Names) -> None:
        super().__init__(order)
        made = {name: nn.Linear(8, 8) for name in NAMES}
        self.kinds = nn.ModuleDict({name: made[name] for name in order})
        for name in order:
            self.register_buffer(f"{name}_freq", torch.ones(8) / len(name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: self.kinds[name](x) * getattr(self, f"{name}_freq") for name in self.order}).square().mean()


class Towers(Base):
    """Lists of layers in a loop: what is independent has no order, what follows has one."""

    def __init__(self, order: Names) -> None:
        super().__init__(order)
        self.towers = nn.ModuleDict({name: nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        found = {}
        for name in self.order:
            y = x
            for layer in self.towers[name]:  # type: ignore[union-attr]
                y = layer(y).relu()
            found[name] = y
        return self.run(x, found).square().mean()


class Outputs(Base):
    """A dict of results, made in the order of the names."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        found = {name: self.layers[NAMES.index(name)](x) for name in self.order}
        return {"loss": (found["full"] * found["near"] * found["chunk"]).square().mean(), **found}


class Counted(Base):
    """Buffers that change in the order of the names."""

    def __init__(self, order: Names) -> None:
        super().__init__(order)
        for name in order:
            self.register_buffer(name, torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            getattr(self, name).mul_(0.5).add_(x.detach().mean(0) * len(name))
        return self.run(x, {name: torch.ones(8, dtype=x.dtype) for name in NAMES}).square().mean()


class Checked(Base):
    """Questions about values, which the graph checks for its own sake."""

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            if (x.abs() > 1000 * len(name)).any():
                raise ValueError("too large")
        return self.run(x, {name: torch.ones(8, dtype=x.dtype) for name in NAMES}).square().mean()


class Turns(Base):
    """A loop of names in every turn of a loop that hands on."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            parts = {name: torch.roll(x, len(name), -1).sigmoid() for name in self.order}
            x = layer(x) + parts["full"] * parts["near"] - parts["chunk"]
        return x.square().mean()


SAME: tuple[Callable[[Names], Base], ...] = (
    Tables,
    Comprehension,
    Branches,
    OneLine,
    Constants,
    Dropouts,
    Shared,
    Registered,
    Towers,
    Outputs,
    Counted,
    Checked,
    Turns,
)
"""What is computed does not depend on the order."""


class Summed(Base):
    """A sum in the order of the names: not the same number in another order."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return sum(self.layers[NAMES.index(name)](x) for name in self.order).square().mean()  # type: ignore[union-attr]


class Frozen(Base):
    """Numbers in the order of the names."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) * torch.tensor([float(len(name)) for name in self.order for _ in range(8)][:8], dtype=x.dtype)).mean()


class Listed(Base):
    """Matrices of one shape, one after the other in the order of the names."""

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.layers[NAMES.index(name)](x).tanh()
        return x.square().mean()


OTHER: tuple[Callable[[Names], Base], ...] = (Summed, Frozen, Listed)
"""What is computed depends on the order."""
