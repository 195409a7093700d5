"""Random stacks of blocks: what is cut into stages, along a sequence, over experts; for batches of any number of samples and positions.

Two classes of blocks are drawn out of attention, perceptrons, convolutions, shifts, sums over positions and statistics. A model is a row
of such blocks with connections that skip some of them, blocks that occur twice, parameters that several of them read, mixtures of experts,
terms of the loss from anywhere, and an embedding that may be the head as well.

    program = draw_stack(17, data=2, depth=4)
    program.batch(1, (4, 9))                          a batch of another shape: the module writes no size of the batch out
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.random_programs.programs import Program

Layer = Callable[["_Draw"], tuple[list[str], list[str]]]
"""Draws the lines of `__init__` and `forward` of one layer of a block."""

KEEP = "(torch.rand(b, n) > 0.3) | (torch.arange(n) == 0)"
"""Which positions count: at least the first of every sample."""


@dataclass
class _Draw:
    """What the parts of a model agree on."""

    rng: random.Random
    width: int = 8
    heads: int = 2
    mask: str = "causal"
    """Who attends to whom: "causal", "window", "padded" or "all"."""
    count: int = 0
    made: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def name(self) -> str:
        """A name that nothing has yet."""
        self.count += 1
        return f"m{self.count}"

    def some(self, *options: str) -> str:
        """One of them."""
        return self.rng.choice(options)


def draw_stack(
    seed: int,
    *,
    data: int = 1,
    depth: int = 2,
    more: int = 3,
    experts: bool = False,
    multiple: int = 1,
    listed: bool = False,
    uneven: bool = True,
) -> Program:
    """The stack of a seed, of `depth` blocks and up to `more`, for batches that divide by `data`.

    Lengths divide by `multiple`; of `uneven` ones some do not. `listed`: whether blocks are in a list, which makes them units of recompute,
    of data parallelism, and of passes.
    """
    for attempt in range(50):
        program = _model(random.Random(f"stack {seed}.{attempt}"), seed, data, (depth, depth + more), experts, multiple, listed, uneven)
        if program.runs():
            return program
    raise RuntimeError(f"seed {seed}: no stack of 50 runs on one device")


def sizes(rng: random.Random, data: int, multiple: int, *, uneven: bool = True) -> tuple[int, int]:
    """Samples and positions of a batch."""
    length = multiple * rng.randint(1, max(1, 12 // multiple)) if rng.random() < 0.8 or not uneven else rng.randint(2, 11)
    return data * rng.choice([1, 1, 2, 3]), max(2, length)


def _model(
    rng: random.Random, seed: int, data: int, depth: tuple[int, int], experts: bool, multiple: int, listed: bool, uneven: bool
) -> Program:
    g = _Draw(rng, rng.choice([8, 8, 12, 16]), rng.choice([2, 4]), rng.choice(["causal", "causal", "window", "padded", "all"]))
    text, number = rng.random() < 0.75, rng.choice([11, 16, 17, 24])
    shape = sizes(rng, data, multiple, uneven=uneven)
    library = "".join(_block(g, f"Block{i}") for i in range(2))
    _enter(g, text, number)
    terms = _body(g, depth, experts, listed)
    terms.append(_leave(g, text, number))
    inputs = _inputs(g, " ".join([library, *g.lines, *terms]), "ids" if text else "x", number)
    return Program(seed, tuple(g.made), (*g.lines, f"loss = {' + '.join(reversed(terms))}"), inputs, shape, library)


def _inputs(g: _Draw, used: str, first: str, number: int) -> tuple[tuple[str, str], ...]:
    """What forward reads."""
    every = {
        "ids": f"torch.randint(0, {number}, (b, n))",
        "x": f"torch.randn(b, n, {g.width}, dtype=torch.double)",
        "labels": f"torch.where({KEEP}, torch.randint(0, {number}, (b, n)), -100)",
        "keep": KEEP,
        "y": "torch.randint(0, 5, (b,))",
    }
    return tuple((name, made) for name, made in every.items() if name in (first, "keep") or re.search(rf"\b{name}\b", used))


# -- from the inputs to the first block --------------------------------------------------------------------------------------------------


def _enter(g: _Draw, text: bool, number: int) -> None:
    w = g.width
    if text:
        g.made.append(f"self.embed = nn.Embedding({number}, {w})")
        g.lines.append("h = self.embed(ids)")
    else:
        g.made.append(f"self.embed = nn.Linear({w}, {w})")
        g.lines.append("h = self.embed(x)")
    place = g.rng.randrange(4)
    if place == 0:
        g.made.append(f"self.place = nn.Embedding(24, {w})")
        g.lines.append("h = h + self.place(torch.arange(h.shape[1]))")
    elif place == 1:
        g.made.append(f"self.place = nn.Parameter(torch.randn(24, {w}) / 4)")
        g.lines.append("h = h + self.place[: h.shape[1]]")
    elif place == 2:
        g.lines.append("at = torch.arange(h.shape[1], dtype=h.dtype)[:, None] * torch.linspace(0.1, 1, h.shape[2], dtype=h.dtype)")
        g.lines.append("h = h + at.sin() / 2")
    if g.rng.random() < 0.3:
        g.made.append("self.shared = nn.Parameter(torch.tensor(0.7))")
        g.lines.append("h = h * self.shared")
    g.lines.append(_MASKS[g.mask])


_MASKS = {
    "causal": "mask = None",
    "all": "mask = None",
    "window": "mask = ((d := torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])) >= 0) & (d < 3)",
    "padded": "mask = keep[:, None, None, :]",
}


# -- blocks ------------------------------------------------------------------------------------------------------------------------------


def _block(g: _Draw, name: str) -> str:
    """A class of blocks: one to three layers, of which the first often attends."""
    made, lines = list[str](), list[str]()
    layers = [g.rng.choice([_attention, _attention, *_LAYERS])] + [g.rng.choice(_LAYERS) for _ in range(g.rng.randrange(3))]
    for layer in layers:
        m, found = layer(g)
        made += m
        lines += found
    text = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()", *(f"        {m}" for m in made)]
    return "\n".join(
        [*text, "", "    def forward(self, h, mask, keep):", *(f"        {line}" for line in lines), "        return h", "", ""]
    )


def _norm(g: _Draw) -> tuple[list[str], str]:
    """What a layer reads: the stream, mostly normalised."""
    name = g.name()
    kind = g.some(f"nn.LayerNorm({g.width})", f"nn.RMSNorm({g.width})", "")
    return ([f"self.{name} = {kind}"], f"self.{name}(h)") if kind else ([], "h")


def _attention(g: _Draw) -> tuple[list[str], list[str]]:
    made, read = _norm(g)
    q, kv, o = g.name(), g.name(), g.name()
    w, heads = g.width, g.heads
    groups = g.rng.choice([k for k in (1, 2, 4) if heads % k == 0])
    size = w // heads
    bias = g.some("", ", bias=False")
    made += [
        f"self.{q} = nn.Linear({w}, {w}{bias})",
        f"self.{kv} = nn.Linear({w}, {2 * groups * size}{bias})",
        f"self.{o} = nn.Linear({w}, {w}{bias})",
    ]
    lines = [
        f"r = {read}",
        f"q = self.{q}(r).unflatten(-1, ({heads}, {size})).transpose(1, 2)",
        f"k, v = [t.unflatten(-1, ({groups}, {size})).transpose(1, 2) for t in self.{kv}(r).chunk(2, -1)]",
    ]
    if g.rng.random() < 0.4:
        lines += [
            f"angle = torch.arange(h.shape[1], dtype=h.dtype)[:, None] * torch.linspace(0.2, 1, {size // 2}, dtype=h.dtype)",
            "c, s = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()",
            "q, k = [t * c + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * s for t in (q, k)]",
        ]
    return made, [*lines, *_attend(g, heads, groups), f"h = h + self.{o}(a.transpose(1, 2).flatten(2))"]


def _attend(g: _Draw, heads: int, groups: int) -> list[str]:
    """Torch's attention, or written out."""
    written = g.rng.random() < 0.35
    if groups != heads and (written or g.rng.random() < 0.5):
        repeat = [f"k, v = [t.repeat_interleave({heads // groups}, 1) for t in (k, v)]"]
        gqa = ""
    else:
        repeat, gqa = [], ", enable_gqa=True" if groups != heads else ""
    if not written:
        how = {"causal": ", is_causal=True", "all": ""}.get(g.mask, ", attn_mask=mask")
        return [*repeat, f"a = F.scaled_dot_product_attention(q, k, v{how}{gqa})"]
    hidden = {
        "causal": ["p = p.masked_fill(torch.ones(p.shape[-2:], dtype=torch.bool).triu(1), float('-inf'))"],
        "all": [],
    }.get(g.mask, ["p = p.masked_fill(~mask, float('-inf'))"])
    bias = ["p = p - 0.1 * (torch.arange(p.shape[-1]) - torch.arange(p.shape[-1])[:, None]).abs()"] if g.rng.random() < 0.3 else []
    return [*repeat, "p = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5", *bias, *hidden, "a = p.softmax(-1) @ v"]


def _perceptron(g: _Draw) -> tuple[list[str], list[str]]:
    made, read = _norm(g)
    up, down, inner = g.name(), g.name(), g.rng.choice([8, 12, 16])
    act = g.some("F.gelu", "F.silu", "torch.tanh")
    if g.rng.random() < 0.5:
        made += [f"self.{up} = nn.Linear({g.width}, {2 * inner})", f"self.{down} = nn.Linear({inner}, {g.width}, bias=False)"]
        return made, [f"u, t = self.{up}({read}).chunk(2, -1)", f"h = h + self.{down}({act}(u) * t)"]
    made += [f"self.{up} = nn.Linear({g.width}, {inner})", f"self.{down} = nn.Linear({inner}, {g.width})"]
    return made, [f"h = h + self.{down}({act}(self.{up}({read})))"]


def _convolution(g: _Draw) -> tuple[list[str], list[str]]:
    made, read = _norm(g)
    conv, groups = g.name(), g.some("1", str(g.width))
    if g.rng.random() < 0.5:
        made += [f"self.{conv} = nn.Conv1d({g.width}, {g.width}, 3, padding=1, groups={groups})"]
        return made, [f"h = h + self.{conv}({read}.transpose(1, 2)).transpose(1, 2)"]
    made += [f"self.{conv} = nn.Conv1d({g.width}, {g.width}, 3, groups={groups})"]
    return made, [f"h = h + self.{conv}(F.pad({read}.transpose(1, 2), (2, 0))).transpose(1, 2)"]


def _shift(g: _Draw) -> tuple[list[str], list[str]]:
    """Every position mixed with the one before."""
    made, read = _norm(g)
    mix = g.name()
    made += [f"self.{mix} = nn.Parameter(torch.rand({g.width}))"]
    before = g.some("F.pad(r, (0, 0, 1, -1))", "torch.cat([torch.zeros_like(r[:, :1]), r[:, :-1]], 1)", "r.roll(1, 1)")
    return made, [f"r = {read}", f"h = h + self.{mix} * ({before} - r)"]


def _over_positions(g: _Draw) -> tuple[list[str], list[str]]:
    made, read = _norm(g)
    lin = g.name()
    made += [f"self.{lin} = nn.Linear({g.width}, {g.width})"]
    form = g.some(
        f"h = h * torch.sigmoid(self.{lin}({read}.mean(1, keepdim=True)))",
        f"h = h + self.{lin}({read}).cumsum(1) / (torch.arange(h.shape[1]) + 1)[:, None]",
        f"h = h + (self.{lin}({read}) * keep[..., None]).sum(1, keepdim=True) / keep.sum(1)[:, None, None]",
        f"h = h + self.{lin}({read}).softmax(1)",
        f"h = h + {read} * self.{lin}({read}).amax(1, keepdim=True)",
        f"h = h + self.{lin}({read}.flip(1))",
    )
    return made, [form]


def _scaled(g: _Draw) -> tuple[list[str], list[str]]:
    scale = g.name()
    shape, form = g.rng.choice([(str(g.width), "h * (1 + {0})"), (str(g.width), "h + {0}"), ("1", "h * {0}"), ("1, 1, 1", "h - {0}")])
    return [f"self.{scale} = nn.Parameter(torch.randn({shape}) / 2)"], [f"h = {form.format('self.' + scale)}"]


def _statistic(g: _Draw) -> tuple[list[str], list[str]]:
    """A running mean that forward updates."""
    name = g.name()
    made = [f"self.register_buffer('{name}', torch.zeros({g.width}, dtype=torch.double))"]
    return made, [f"self.{name}.mul_(0.9).add_(h.detach().mean((0, 1)) * 0.1)", f"h = h - self.{name}"]


_LAYERS: tuple[Layer, ...] = (
    *(_perceptron,) * 5, *(_attention,) * 3, *(_convolution,) * 2, *(_shift,) * 2, *(_over_positions,) * 2, *(_scaled,) * 2, _statistic,
)  # fmt: skip


# -- the row of blocks -------------------------------------------------------------------------------------------------------------------


def _body(g: _Draw, depth: tuple[int, int], experts: bool, listed: bool) -> list[str]:
    """Blocks with skips, shared blocks and experts; the terms of the loss that they leave behind."""
    terms, kept, blocks, made = list[str](), list[str](), list[str](), {"layers": list[str](), "mixtures": list[str]()}

    def module(name: str, owner: str, text: str) -> str:
        """Where a new module is."""
        if not listed:
            g.made.append(f"self.{name} = {text}")
            return name
        made[owner].append(text)
        return f"{owner}[{len(made[owner]) - 1}]"

    for i in range(g.rng.randint(*depth)):
        if blocks and g.rng.random() < 0.12:
            name = g.rng.choice(blocks)
        else:
            name = module(f"l{i}", "layers", f"Block{g.rng.choice([0, 0, 1])}()")
            blocks.append(name)
        g.lines.append(f"h = self.{name}(h, mask, keep)")
        if experts and (i == 0 or g.rng.random() < 0.5):
            style = g.some("mixtral", "skipping", "hits", "masked", "flat")
            mixture = module(f"e{i}", "mixtures", f"MoE('{style}', width={g.width})")
            g.lines += [f"y{i}, p{i} = self.{mixture}(F.rms_norm(h, h.shape[-1:]))", f"h = h + y{i}"]
            terms += [f"0.01 * p{i}"] if g.rng.random() < 0.7 else []
        if kept and g.rng.random() < 0.4:
            g.lines.append(_joined(g, g.rng.choice(kept)))
        if g.rng.random() < 0.4:
            g.lines.append(f"s{i} = {g.some('h', 'h * 0.5', 'torch.tanh(h)')}")
            kept.append(f"s{i}")
        if g.rng.random() < 0.12:
            terms.append(
                g.some(
                    "0.01 * h.pow(2).mean()",
                    "0.1 * (h.mean(-1) * keep).sum() / keep.sum()",
                    "0.02 * h.abs().mean((1, 2)).sum() / h.shape[0]",
                )
            )
            g.lines.append(f"t{i} = {terms.pop()}")
            terms.append(f"t{i}")
    if g.rng.random() < 0.1:
        terms.append(f"0.01 * sum(p.pow(2).sum() for p in self.{g.rng.choice(blocks)}.parameters())")
    g.made += [f"self.{owner} = nn.ModuleList([{', '.join(texts)}])" for owner, texts in made.items() if texts]
    return terms


def _joined(g: _Draw, skip: str) -> str:
    name = g.name()
    form = g.rng.randrange(3)
    if form == 0:
        return f"h = h + {skip}"
    if form == 1:
        g.made.append(f"self.{name} = nn.Linear({2 * g.width}, {g.width})")
        return f"h = self.{name}(torch.cat([h, {skip}], -1))"
    g.made.append(f"self.{name} = nn.Linear({g.width}, {g.width}, bias=False)")
    return f"h = h + self.{name}({skip})"


# -- from the last block to the loss -----------------------------------------------------------------------------------------------------


def _leave(g: _Draw, text: bool, number: int) -> str:
    if g.rng.random() < 0.7:
        g.made.append(f"self.last = nn.{g.some('LayerNorm', 'RMSNorm')}({g.width})")
        g.lines.append("h = self.last(h)")
    if not text:
        return g.some(
            "F.mse_loss(h, x.roll(1, 1))",
            "((h - x).pow(2).mean(-1) * keep).sum() / keep.sum()",
            "F.smooth_l1_loss(h[keep], x[keep])" if g.rng.random() < 0.3 else "F.huber_loss(h, x)",
            "h.mean(1).pow(2).sum(-1).mean()",
        )
    if g.rng.random() < 0.15:
        g.made.append(f"self.head = nn.Linear({g.width}, 5)")
        return g.some(
            "F.cross_entropy(self.head(h.mean(1)), y)", "F.cross_entropy(self.head(h[:, -1]), y)", "F.cross_entropy(self.head(h[:, 0]), y)"
        )
    if g.rng.random() < 0.5:
        g.lines.append(f"z = F.linear(h, self.embed.weight){g.some('', ' * 0.7', ' / h.shape[-1] ** 0.5')}")
    else:
        g.made.append(f"self.head = nn.Linear({g.width}, {number}{g.some('', ', bias=False')})")
        g.lines.append("z = self.head(h)")
    if g.rng.random() < 0.15:
        g.lines.append("z = torch.tanh(z / 5) * 5")
    loss = g.some(
        f"F.cross_entropy(z[:, :-1].reshape(-1, {number}), ids[:, 1:].reshape(-1))",
        f"F.cross_entropy(z[:, :-1].reshape(-1, {number}), labels[:, 1:].reshape(-1))",
        f"F.cross_entropy(z.view(-1, {number}), labels.view(-1))",
        "F.cross_entropy(z.transpose(1, 2), labels)",
        "F.cross_entropy(z.flatten(0, 1), labels.flatten(), label_smoothing=0.1)",
        "(F.cross_entropy(z.transpose(1, 2), ids, reduction='none') * keep).sum() / keep.sum()",
        "F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction='sum') / (labels != -100).sum()",
        "-(z.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * keep).sum() / keep.sum()",
    )
    return f"{loss} + 0.001 * z.logsumexp(-1).pow(2).mean()" if g.rng.random() < 0.15 else loss
