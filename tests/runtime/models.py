"""A small model with everything that is awkward, and its lowered form for column and row parallel layers, made by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from meshpar._torch import without_modes
from meshpar.capture.export import capture
from meshpar.graph.captured import Captured
from meshpar.graph.facts import facts, set_facts
from meshpar.mesh import axis
from meshpar.ops import collectives
from meshpar.runtime.blocks import Tree, build
from meshpar.runtime.parameters.specs import ParameterSpec, convert_state_dicts, distribute, mark_all
from meshpar.sharding.types import Shard, Type, plain

VOCAB, HIDDEN, WIDE, NARROW, LAYERS = 7, 6, 8, 4, 3


class Layer(nn.Module):
    """A fused projection to two widths, and one back from each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.fused = nn.Linear(HIDDEN, WIDE + NARROW)
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)
        self.gate = nn.Linear(NARROW, HIDDEN, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, narrow = self.fused(self.norm(x)).split([WIDE, NARROW], -1)
        return x + self.frozen * self.scale * (self.down(F.gelu(wide)) + self.gate(torch.tanh(narrow)))


class Net(nn.Module):
    """Embedding tied to the head, blocks, a buffer that forward updates, and a loss that is a sum over the batch divided by a constant."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("table", torch.linspace(0.5, 1.5, HIDDEN), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        x = self.embed(ids) * self.table
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten(), reduction="sum") / 64


def make_net(*, tied: bool = True, dtype: torch.dtype = torch.float64) -> Net:
    """A net in which no parameter has a value that hides a mistake."""
    torch.manual_seed(1)
    net = Net(tied=tied).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def make_batch(seed: int = 0, *, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, VOCAB, (rows, 5), generator=generator) for _ in range(2))
    return ids, labels


FUSED = Shard(0, 1, ((WIDE // 2, 2), (NARROW // 2, 2)))
"""Two segments of different sizes, in units of two rows."""


def placements(fqn: str) -> dict[str, Type]:
    """How tensor parallelism lays a parameter of the net out."""
    name = ".".join(fqn.split(".")[-2:])
    by_name: dict[str, Type] = {
        "fused.weight": FUSED,
        "fused.bias": FUSED,
        "down.weight": plain(1, WIDE),
        "gate.weight": plain(1, NARROW),
    }
    return {"tp": by_name[name]} if name in by_name else {}


def specs(net: Net, *, tp: bool) -> dict[str, ParameterSpec]:
    return {
        name: ParameterSpec(name, tuple(p.shape), p.dtype, p.requires_grad, placements(name) if tp else {})
        for name, p in net.named_parameters(remove_duplicate=False)
    }


def lower(captured: Captured, mesh: DeviceMesh) -> fx.Graph:
    """Column and row parallel layers by hand: f before the fused projection, g after those that follow it."""
    tp = axis(mesh, "tp")
    if tp.size == 1:
        return captured.graph
    how = {"group": tp.group, "size": tp.size, "rank": tp.rank}
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            weight = str(node.args[1].target)
            if weight.endswith("fused.weight"):
                with graph.inserting_before(node):
                    f = graph.call_function(collectives.i_to_r, (node.args[0],), how)
                set_facts(f, facts(node))
                node.update_arg(0, f)
            elif weight.endswith(("down.weight", "gate.weight")):
                with graph.inserting_after(node):
                    g = graph.call_function(collectives.p_to_i, (node,), how)
                set_facts(g, facts(node))
                node.replace_all_uses_with(g, delete_user_cb=lambda user, g=g: user is not g)
        elif node.target is torch.ops.aten.split_with_sizes.default:
            node.update_arg(1, [size // tp.size for size in node.args[1]])
    graph.lint()
    return graph


def make_tree(net: Net, mesh: DeviceMesh, *, rows: int = 4, master: Net | None = None, **options: object) -> Tree:
    """The net as a tree over `mesh`, on this rank or on all simulated ones; parameters are those of `master`, if given."""
    ids, labels = make_batch(rows=rows)
    with without_modes():
        captured = capture(net, (ids, labels))
    layouts = specs(master or net, tp=axis(mesh, "tp").size > 1)
    parameters = {name: distribute(p.detach(), layouts[name], mesh) for name, p in (master or net).named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    tree = build(
        lower(captured, mesh),
        parameters,
        buffers,
        captured.constants,
        aliases=captured.aliases,
        non_persistent=["table"],
        mutations=captured.mutations,
        **options,  # type: ignore[arg-type]
    )
    mark_all(tree, layouts)
    convert_state_dicts(tree)
    return tree


def world_mesh(spec: str) -> DeviceMesh:
    from meshpar.mesh import make_mesh

    return make_mesh(spec, "cpu")


def data_sum(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum of a scalar over the data ranks."""
    x = x.detach().clone()
    for name in mesh.mesh_dim_names or ():
        if name.startswith("dp"):
            dist.all_reduce(x, group=mesh.get_group(name))
    return x
