"""Random programs: modules written line by line from a seed, out of a wide vocabulary of operators, with a batch and a loss.

A program is text, so that a failure can be read, shortened and kept. Every line is run as soon as it is drawn; what raises, overflows or
grows too large is drawn again. Sizes are tiny and coincide on purpose: a batch as long as a sequence as wide as a head confuses dims.

    program = draw(17, data=2)        the same for the same seed; the batch divides by 2
    print(program.source)
    program.batch(1, (4, 9))          other values, and another shape: four samples of nine positions
    mp.verify(program.model(), "dp=2,tp=2", program.batch())
"""

# ruff: noqa: E501  (the vocabulary: many short texts to a line)
from __future__ import annotations

import linecache
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.moe import MoE

LARGEST, MOST = 1e3, 3000
"""The largest element and the largest number of elements of any value."""


@dataclass(frozen=True)
class Program:
    """One module as text, and what it is called with."""

    seed: int
    made: tuple[str, ...]
    """Lines of `__init__`."""
    lines: tuple[str, ...]
    """Lines of `forward`; the last one is `loss = ...`."""
    inputs: tuple[tuple[str, str], ...]
    """Name -> the expression that makes the input, of `b` samples and `n` positions."""
    sizes: tuple[int, int] = (0, 0)
    """`b` and `n` of the first batch."""
    library: str = ""
    """Classes that the module is made of."""

    @property
    def source(self) -> str:
        """The module as Python."""
        names = ", ".join(name for name, _ in self.inputs)
        made = [*self.made, "pass"] if not self.made else self.made
        library = [self.library] if self.library else []
        text = [
            *library,
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {m}" for m in made),
            "",
        ]
        return "\n".join(
            [*text, f"    def forward(self, {names}):", *(f"        {line}" for line in self.lines), "        return loss", ""]
        )

    def model(self) -> nn.Module:
        """A fresh module, in float64, the same at every call."""
        torch.manual_seed(self.seed)
        name = f"<program {self.seed} {crc32(self.source.encode()):08x}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "MoE": MoE}
        exec(compile(self.source, name, "exec"), scope)
        found: nn.Module = scope["Model"]().double()
        return found

    def batch(self, step: int = 0, sizes: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The global batch of a step, the same at every call; of other sizes than the first where they are given."""
        torch.manual_seed(self.seed + 1 + step)
        b, n = sizes or self.sizes
        return {name: eval(text, {"torch": torch, "b": b, "n": n}) for name, text in self.inputs}

    def without(self, line: int) -> Program:
        """The program without one line of `forward`."""
        return replace(self, lines=self.lines[:line] + self.lines[line + 1 :])

    def runs(self, sizes: tuple[int, int] | None = None) -> bool:
        """Whether it runs on one device (for a batch of these sizes) and some parameter has a gradient that is more than rounding."""
        try:
            model = self.model()
            loss = model(**self.batch(0, sizes))
            loss.backward()
        except Exception:
            return False
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        largest = max((float(g.to_dense().abs().max()) for g in gradients), default=0.0)
        return bool(loss.isfinite()) and 1e-6 < largest < 1e6


def draw(seed: int, *, data: int = 1, lines: int = 0) -> Program:
    """The program of a seed, with a batch that divides by `data`; `lines` of forward, or 3 to 12."""
    for attempt in range(50):
        maker = _Maker(random.Random(f"{seed}.{attempt}"), seed, data)
        program = maker.run(lines)
        if program is not None and program.runs():
            return program
    raise RuntimeError(f"seed {seed}: no program of 50 runs on one device")


def shortest(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program with every line left out that is not needed for it to fail."""
    changed = True
    while changed:
        changed = False
        for line in reversed(range(len(program.lines) - 1)):
            candidate = _tidy(program.without(line))
            if candidate.runs() and fails(candidate):
                program, changed = candidate, True
        terms = program.lines[-1].removeprefix("loss = ").split(" + ")
        for term in range(len(terms)) if len(terms) > 1 else ():
            rest = " + ".join(terms[:term] + terms[term + 1 :])
            candidate = _tidy(replace(program, lines=(*program.lines[:-1], f"loss = {rest}")))
            if candidate.runs() and fails(candidate):
                program, changed = candidate, True
                break
    return program


def _tidy(program: Program) -> Program:
    text = "\n".join(program.lines)
    return replace(program, made=tuple(m for m in program.made if m.split(" ")[0].split("(")[-1].strip("'\",") in text or "register" in m))


@dataclass
class _Value:
    name: str
    tensor: Tensor
    depth: int = 0
    used: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        return self.tensor.ndim


class _Maker:
    def __init__(self, rng: random.Random, seed: int, data: int) -> None:
        self.rng, self.seed = rng, seed
        self.batch = data * rng.choice([1, 2, 2, 3])
        if self.batch == 1:
            self.batch = 2
        small = [2, 3, 4, 5, 6, 7, 8, self.batch]
        self.length, self.width = rng.choice([1, *small]), rng.choice([4, 6, 8, 8, 12, 9, 5, self.batch * 2])
        self.made: list[str] = []
        self.lines: list[str] = []
        self.values: list[_Value] = []
        self.inputs: list[tuple[str, str]] = []
        self.owner = nn.Module()
        self.scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.owner}
        self.count = 0

    # -- the story -----------------------------------------------------------------------------------------------------------------------

    def run(self, lines: int) -> Program | None:
        torch.manual_seed(self.seed)
        self._inputs()
        target, tries = lines or self.rng.randint(3, 12), 0
        names = list(VOCABULARY)
        weights = [VOCABULARY[n] for n in names]
        while len(self.lines) < target and tries < 300:
            tries += 1
            if len(self.lines) < 2 and self.rng.random() < 0.6:
                kind: Callable[[_Maker], bool | None] = parameters
            else:
                kind = self.rng.choices(names, weights)[0]
            kind(self)
        loss = self._loss()
        if loss is None:
            return None
        lines = (*self.lines, f"loss = {loss}")
        return Program(self.seed, tuple(self.made), lines, tuple(self.inputs), (self.batch, self.length))

    def _inputs(self) -> None:
        w = self.width
        every = [
            ("x", f"torch.randn(b, n, {w}, dtype=torch.double)"),
            ("ids", "torch.randint(0, 7, (b, n))"),
            ("y", "torch.randint(0, 5, (b,))"),
            ("keep", "torch.rand(b, n) > 0.4"),
            ("z", f"torch.randn(b, {w}, dtype=torch.double)"),
            (
                "image",
                f"torch.randn(b, {self.rng.choice([1, 3, 4])}, {self.rng.choice([4, 5, 6])}, {self.rng.choice([4, 6])}, dtype=torch.double)",
            ),
            ("weight", "torch.rand(b, dtype=torch.double)"),
        ]
        first = self.rng.choice([0, 0, 0, 1, 4, 5])
        kept = [e for i, e in enumerate(every) if i == first or self.rng.random() < 0.4]
        for name, text in kept:
            self.inputs.append((name, text))
            self._keep(name, eval(text, {"torch": torch, "b": self.batch, "n": self.length}))

    def _keep(self, name: str, tensor: Tensor, depth: int = 0) -> None:
        self.scope[name] = tensor
        self.values.append(_Value(name, tensor, depth))

    # -- drawing -------------------------------------------------------------------------------------------------------------------------

    def pick(self, fits: Callable[[_Value], bool] = lambda v: True, *, whole: bool = False) -> _Value | None:
        """A floating value (any with `whole`), recent and unused ones first."""
        found = [v for v in self.values if (whole or v.tensor.is_floating_point()) and v.tensor.numel() and fits(v)]
        if not found:
            return None
        weights = [(3.0 if not v.used else 1.0) * (1.0 + 2.0 * v.tensor.requires_grad) * (1 + i / 4) for i, v in enumerate(found)]
        return self.rng.choices(found, weights)[0]

    def like(self, shape: Sequence[int]) -> _Value | None:
        """A floating value of this shape."""
        return self.pick(lambda v: v.shape == tuple(shape))

    def dim(self, value: _Value, *, last: bool = False) -> int:
        """A dim, counted from either end."""
        at = value.rank - 1 if last else self.rng.randrange(value.rank)
        return at - value.rank if self.rng.random() < 0.4 else at

    def module(self, text: str) -> str:
        """A submodule or parameter made by `text`; its name."""
        self.count += 1
        name = f"m{self.count}"
        torch.manual_seed(self.seed * 100 + self.count)
        made = eval(text, self.scope)
        setattr(self.owner, name, made.double() if isinstance(made, nn.Module) else made)
        self.made.append(f"self.{name} = {text}")
        return f"self.{name}"

    def add(self, text: str, *reads: _Value | None, outs: int = 1) -> bool:
        """Run `name = text` and keep the line if the results are of use."""
        self.count += 1
        names = [f"v{self.count}" if outs == 1 else f"v{self.count}_{k}" for k in range(outs)]
        line = f"{', '.join(names)}{',' if outs > 1 and len(names) == 1 else ''} = {text}"
        return self.do(line, names, *reads)

    def do(self, line: str, names: Sequence[str], *reads: _Value | None) -> bool:
        """Run a line that makes `names` and keep it if the results are of use."""
        torch.manual_seed(0)
        scope = dict(self.scope)
        try:
            exec(line, scope)
        except Exception:
            self._forget()
            return False
        made = [scope[n] for n in names]
        if not all(_useful(t) for t in made):
            self._forget()
            return False
        self.lines.extend(line.split("\n"))
        for value in reads:
            if value is not None:
                value.used += 1
        for name, tensor in zip(names, made, strict=True):
            self._keep(name, tensor)
        return True

    def _forget(self) -> None:
        """Modules made for a line that was not kept."""
        text = "\n".join(self.lines)
        self.made = [m for m in self.made if m.split(" ")[0] in text]

    # -- the end -------------------------------------------------------------------------------------------------------------------------

    def _loss(self) -> str | None:
        open_ = [v for v in self.values if v.tensor.is_floating_point() and v.tensor.requires_grad and not v.used]
        if not open_:
            open_ = [v for v in self.values if v.tensor.is_floating_point() and v.tensor.requires_grad][-1:]
        if not open_:
            return None
        return " + ".join(self._term(v) for v in open_[-4:])

    def _term(self, v: _Value) -> str:
        b, name, rng = self.batch, v.name, self.rng
        simple = [f"{name}.pow(2).mean()", f"torch.sin({name}).sum() / {max(v.tensor.numel(), 1)}", f"torch.cos({name}).mean()"]
        given = {n for n, _ in self.inputs}
        options = list(simple)
        if v.rank >= 2 and v.shape[0] == b and v.shape[1] >= 5 and "y" in given:
            flat = name if v.rank == 2 else f"{name}.flatten(2).mean(2)"
            reduction = rng.choice(["mean", "mean", "sum"])
            extra = rng.choice(
                ["", ", ignore_index=2", ", label_smoothing=0.1", f", weight=torch.linspace(0.5, 2, {v.shape[1]}, dtype=torch.double)"]
            )
            options += [f"F.cross_entropy({flat}, y, reduction='{reduction}'{extra})"] * 3
            options += [f"(F.cross_entropy({flat}, y, reduction='none'{extra}) * (y != 1)).sum() / (y != 1).sum().clamp(min=1)"]
            options += [f"F.nll_loss(F.log_softmax({flat}, 1), y)"]
        if v.rank == 3 and v.shape[:2] == (b, self.length) and v.shape[2] >= 7 and "ids" in given:
            extra = rng.choice(["", ", ignore_index=2", ", label_smoothing=0.1"])
            options += [
                f"F.cross_entropy({name}.flatten(0, 1), ids.flatten(){extra})",
                f"F.cross_entropy({name}.transpose(1, 2), ids{extra})",
            ] * 2
            if self.length > 1:
                options += [f"F.cross_entropy({name}[:, :-1].reshape(-1, {v.shape[2]}), ids[:, 1:].reshape(-1){extra})"] * 2
        if v.rank == 3 and v.shape[:2] == (b, self.length) and "keep" in given:
            options += [f"({name}.pow(2).mean(-1) * keep).sum() / keep.sum().clamp(min=1)", f"{name}[keep].pow(2).sum() / 7"]
        if v.rank == 2 and v.shape[0] == b and v.shape[1] > 1:
            n = f"F.normalize({name}, dim=1)"
            options += [
                f"F.cross_entropy({n} @ {n}.T, torch.arange({b}))",
                f"F.kl_div(F.log_softmax({name}, 1), F.softmax({name}.detach() * 0.5, 1), reduction='batchmean')",
                f"F.cross_entropy({name}, F.softmax(torch.flip({name}, [0]).detach(), 1))",
                f"(1 - F.cosine_similarity({name}, {name}.roll(1, 0), dim=1)).mean()",
            ]
        if v.rank == 1 and v.shape[0] == b and "weight" in given:
            options += [f"F.binary_cross_entropy_with_logits({name}, weight, pos_weight=torch.tensor(1.5, dtype=torch.double))"] * 2
        if v.rank:
            options += [
                f"F.huber_loss({name}, torch.zeros_like({name}))",
                f"F.mse_loss({name}, {name}.detach().flip(0), reduction='{rng.choice(['mean', 'sum'])}') / 3",
                f"F.smooth_l1_loss({name}, torch.ones_like({name}))",
                f"F.binary_cross_entropy_with_logits({name}, ({name} > 0.1).to({name}.dtype))",
                f"{name}.std() + {name}.mean()" if v.tensor.numel() > 1 else simple[0],
                f"torch.logsumexp({name}.flatten(), 0)",
            ]
        return rng.choice(options)


def _useful(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.numel() > MOST or not value.numel():
        return False
    return not value.is_floating_point() or bool(value.detach().isfinite().all() and value.detach().abs().max() < LARGEST)


# -- the vocabulary ----------------------------------------------------------------------------------------------------------------------

VOCABULARY: dict[Callable[[_Maker], bool | None], float] = {}


def word(weight: float) -> Callable[[Callable[[_Maker], bool | None]], Callable[[_Maker], bool | None]]:
    """Enter a function that may add a line to a program, with how often it is drawn."""

    def enter(function: Callable[[_Maker], bool | None]) -> Callable[[_Maker], bool | None]:
        VOCABULARY[function] = weight
        return function

    return enter


WIDTHS = [2, 3, 4, 5, 6, 8, 8, 12]


@word(8)
def parameters(g: _Maker) -> bool | None:
    """Layers and bare parameters."""
    if g.rng.random() < 0.25 and (
        ids := g.pick(lambda v: v.tensor.dtype == torch.int64 and v.tensor.min() >= 0 and v.tensor.max() < 16, whole=True)
    ):
        extra = g.rng.choice(["", "", ", padding_idx=1", ", scale_grad_by_freq=True"])
        return g.add(f"{g.module(f'nn.Embedding(16, {g.rng.choice(WIDTHS)}{extra})')}({ids.name})", ids)
    v = g.pick(lambda v: v.rank >= 1)
    if v is None:
        return None
    last, out = v.shape[-1], g.rng.choice([*WIDTHS, v.shape[-1]])
    bias = g.rng.choice(["", ", bias=False"])
    choice = g.rng.randrange(16)
    if choice < 5:
        return g.add(f"{g.module(f'nn.Linear({last}, {out}{bias})')}({v.name})", v)
    if choice == 5:
        inner = g.rng.choice([4, 6, 8, 12])
        act = g.rng.choice(["F.gelu", "F.silu", "torch.tanh", "F.relu", "F.softplus", "torch.sigmoid"])
        up, down = g.module(f"nn.Linear({last}, {inner})"), g.module(f"nn.Linear({inner}, {last})")
        return g.add(f"{v.name} + {down}({act}({up}({v.name})))", v)
    if choice == 6:
        p = g.module(f"nn.Parameter(torch.randn({last}, {out}) / 2)")
        return g.add(
            g.rng.choice(
                [
                    f"{v.name} @ {p}",
                    f"torch.matmul({v.name}, {p})",
                    f"F.linear({v.name}, {p}.t())",
                    f"torch.einsum('...i,io->...o', {v.name}, {p})",
                ]
            ),
            v,
        )
    if choice == 7:
        shape = [n if g.rng.random() < 0.6 else 1 for n in v.shape[g.rng.randrange(v.rank) :]]
        p = g.module(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) / 2)")
        return g.add(f"{v.name} {g.rng.choice('+*-')} {p}", v)
    if choice == 8 and v.rank >= 2:
        heads = g.rng.choice([h for h in (1, 2, 3, 4) if last % h == 0])
        qkv = g.module(f"nn.Linear({last}, {3 * last})")
        lead = ", ".join(map(str, v.shape[:-1]))
        how = g.rng.choice(["chunk", "view"])
        split = f"[t.unflatten(-1, ({heads}, {last // heads})).transpose(-3, -2) for t in {qkv}({v.name}).chunk(3, -1)]"
        if how == "view":
            split = f"{qkv}({v.name}).view({lead}, {heads}, {3 * last // heads}).transpose(-3, -2).chunk(3, -1)"
        name = f"q{g.count}"
        causal = g.rng.choice(["", ", is_causal=True"])
        g.count += 1
        out_name = f"v{g.count}"
        return g.do(
            f"{name} = {split}\n{out_name} = F.scaled_dot_product_attention(*{name}{causal}).transpose(-3, -2).flatten(-2)", [out_name], v
        )
    if choice == 9:
        owned = [m for m in g.made if "nn.Linear" in m]
        if owned:
            name, text = g.rng.choice(owned).split(" = ")
            a, b = (int(t) for t in text.removeprefix("nn.Linear(").split(")")[0].split(",")[:2])
            half = max(1, b // 2)
            forms = [f"F.linear({v.name}, {name}.weight)", f"{name}({v.name})"] if last == a else []
            forms += [f"F.linear({v.name}, {name}.weight[:{half}])", f"F.linear({v.name}, {name}.weight[{half}:])"] * (last == a and b > 1)
            forms += [f"F.linear({v.name}, {name}.weight.t())", f"{v.name} @ {name}.weight"] if last == b else []
            forms += [f"F.linear({v.name}, {name}.weight[:, :{last}])"] if last < a else []
            forms += [f"{v.name} + {name}.weight.sum()", f"{v.name} * {name}.weight.std()", f"{v.name} - {name}.weight.abs().mean(0)[0]"]
            return g.add(g.rng.choice(forms), v)
    if choice == 10:
        norm = g.rng.choice(["LayerNorm", "RMSNorm"])
        shape = v.shape[-1:] if g.rng.random() < 0.7 or v.rank < 3 else v.shape[-2:]
        return g.add(f"{g.module(f'nn.{norm}({list(shape)})')}({v.name})", v)
    if choice == 11 and v.rank >= 2:
        groups = g.rng.choice([k for k in (1, 2, 3, 4) if v.shape[1] % k == 0])
        return g.add(f"{g.module(f'nn.GroupNorm({groups}, {v.shape[1]})')}({v.name})", v)
    if choice == 12 and 2 <= v.rank <= 3 and v.shape[0] > 1:
        kind = g.rng.choice(["BatchNorm1d", "BatchNorm1d", "InstanceNorm1d"]) if v.rank == 3 else "BatchNorm1d"
        extra = (
            ", affine=True, track_running_stats=True"
            if kind == "InstanceNorm1d"
            else g.rng.choice(["", ", momentum=0.3", ", affine=False"])
        )
        return g.add(f"{g.module(f'nn.{kind}({v.shape[1]}{extra})')}({v.name})", v)
    if choice == 13:
        return g.add(f"{g.module(f'nn.PReLU({v.shape[1] if v.rank > 1 and g.rng.random() < 0.5 else 1})')}({v.name})", v)
    if choice == 14:
        p = g.module(f"nn.Parameter(torch.randn({out}, {last}) / 2)")
        return g.add(
            f"torch.{g.rng.choice(['softmax', 'log_softmax', 'cumsum'])}({p}, {g.rng.choice([0, 1, -1])})[{g.rng.randrange(-out, out)}] + {v.name}",
            v,
        )
    if choice == 15:
        p = g.module(f"nn.Parameter(torch.randn({out}, 3, {last}) / 2)")
        return g.add(f"torch.einsum('...i,oki->...{g.rng.choice(['ok', 'ko', 'o', 'k'])}', {v.name}, {p})", v)
    return None


@word(3)
def convolutions(g: _Maker) -> bool | None:
    v = g.pick(lambda v: 3 <= v.rank <= 4)
    if v is None:
        return None
    rank, channels = v.rank - 2, v.shape[1]
    groups = g.rng.choice([k for k in (1, 1, 2, 3, 4, channels) if channels % k == 0])
    out = groups * g.rng.choice([1, 2, 3, 4])
    if g.rng.random() < 0.3:
        text = f"nn.ConvTranspose{rank}d({channels}, {out}, {g.rng.choice([1, 2, 3])}, stride={g.rng.choice([1, 2])}, groups={groups})"
    else:
        kernel = g.rng.choice([1, 2, 3])
        text = (
            f"nn.Conv{rank}d({channels}, {out}, {kernel}, stride={g.rng.choice([1, 1, 2])}, padding={g.rng.choice([0, 1, kernel // 2])}, "
            f"dilation={g.rng.choice([1, 1, 2])}, groups={groups}, bias={g.rng.choice([True, False])})"
        )
    return g.add(f"{g.module(text)}({v.name})", v)


@word(5)
def pointwise(g: _Maker) -> bool | None:
    v = g.pick()
    if v is None:
        return None
    n = v.name
    return g.add(
        g.rng.choice(
            [
                f"F.gelu({n})", f"F.silu({n})", f"torch.tanh({n})", f"F.softplus({n})", f"F.relu({n})", f"torch.sigmoid({n})", f"{n}.abs()",
                f"{n} * 0.5", f"2 - {n}", f"{n} / 3", f"1 / (1 + {n} ** 2)", f"{n}.clamp(-0.5, 0.7)", f"{n}.neg()", f"torch.exp(-{n}.abs())",
                f"torch.where({n} > 0, {n}, 0.1 * {n})", f"{n}.masked_fill({n} < 0, 0.25)", f"torch.maximum({n}, torch.zeros_like({n}))",
                f"F.leaky_relu({n})", f"F.elu({n})", f"F.hardswish({n})", f"{n}.double()", f"{n} * torch.ones_like({n})", f"torch.lerp({n}, {n}.flip(0), 0.3)" if v.rank else f"{n} * 2",
                f"{n} + torch.arange({v.shape[-1]}, dtype=torch.double)" if v.rank else f"{n} + 1", f"torch.addcmul({n}, {n}, {n}, value=0.5)", f"{n}.square()",
                f"torch.sqrt({n}.square() + 0.1)", f"torch.log1p({n}.abs())", f"{n}.detach() * {n}", f"torch.atan2({n}, torch.full_like({n}, 1.5))",
                f"torch.nan_to_num({n})", f"torch.fmod({n}, 0.7)", f"{n}.sign() * {n}", f"({n} > 0.1) * {n}", f"{n}.type_as({n})", f"{n}.to(torch.float64)",
            ]
        ),
        v,
    )  # fmt: skip


@word(5)
def pairs(g: _Maker) -> bool | None:
    """Two values, broadcast against each other."""
    a, b = g.pick(), g.pick()
    if a is None or b is None:
        return None
    op = g.rng.choice(
        [
            "{} + {}",
            "{} - {}",
            "{} * {}",
            "{} / ({}.abs() + 1)",
            "torch.maximum({}, {})",
            "torch.minimum({}, {})",
            "torch.add({}, {}, alpha=2)",
            "torch.where({} > {}, 1.0, 0.5)",
            "torch.hypot({}, {} + 3)",
        ]
    )
    left, right = a.name, b.name
    if a.rank and b.rank and a.shape[-1] != b.shape[-1]:
        form = g.rng.randrange(3)
        if form == 0:
            right = f"{right}.mean(-1, keepdim=True)"
        elif form == 1:
            left, right = f"{left}.unsqueeze(-1)", f"{right}.unsqueeze(-2)"
        else:
            right = f"{right}.mean()"
    return g.add(op.format(left, right), a, b)


@word(8)
def views(g: _Maker) -> bool | None:
    v = g.pick(lambda v: v.rank >= 1)
    if v is None:
        return None
    n, shape, rng, d = v.name, v.shape, g.rng, g.dim(v)
    size = shape[d]
    forms = [
        f"{n}.flatten()", f"{n}.unsqueeze({d})", f"{n}.flip({d})", f"{n}.roll({rng.choice([1, -1, 2])}, {d})", f"{n}.roll(1)",
        f"{n}.select({d}, {rng.randrange(-size, size)})", f"{n}.narrow({d}, {(s := rng.randrange(size))}, {rng.randint(1, size - s)})",
        f"{n}.repeat_interleave({rng.choice([2, 3])}, {d})", f"torch.cat([{n}, {n}], {d})", f"torch.stack([{n}, {n} * 2], {d})",
        f"{n}.unsqueeze({d}).expand({', '.join(['-1'] * (d % v.rank) + [str(rng.choice([2, 3, 4]))] + ['-1'] * (v.rank - d % v.rank))})" if d >= 0 else f"{n}.unsqueeze(0)",
        f"{n}[..., ::2]", f"{n}[..., 1::2]", f"{n}[..., -1]", f"{n}[-1]", f"{n}[{rng.randrange(size) if d == 0 else 0}:]", f"{n}[1:]", f"{n}[:-1]", f"{n}[..., 1:]", f"{n}[..., :-1]", f"{n}[None]", f"{n}[..., None]",
        f"{n}.unfold({d}, {min(size, 2)}, {rng.choice([1, 2])})", f"{n}.squeeze()", f"{n}.squeeze({d})", f"F.pad({n}, ({rng.choice([1, 0, 2, -1])}, {rng.choice([1, 0, -1])}))",
        f"torch.diff({n}, dim={d})", f"{n}.movedim({d}, 0)", f"{n}.cumsum({d})", f"{n}.repeat({', '.join(str(rng.choice([1, 1, 2, 3])) for _ in shape)})",
        f"{n}.repeat(2, {', '.join(str(rng.choice([1, 2])) for _ in shape)})",
        f"torch.cat([{n}.narrow({d}, {size // 2}, {size - size // 2}), {n}.narrow({d}, 0, {size // 2})], {d})" if size > 1 else f"{n}[None]",
        f"torch.cat([{n}, torch.zeros_like({n}.narrow({d}, 0, 1))], {d})", f"torch.cat([{n}.narrow({d}, 0, 1), {n}], {d})",
    ]  # fmt: skip
    if v.rank >= 2:
        order = list(range(v.rank))
        rng.shuffle(order)
        i, j = rng.sample(range(v.rank), 2)
        forms += [
            f"{n}.permute({', '.join(map(str, order))})",
            f"{n}.transpose({i}, {j})",
            f"{n}.transpose({i}, {j}).flatten(-2)",
            f"{n}.flatten(0, 1)",
            f"{n}.flatten(-2)",
        ] * 3
        forms += [
            f"{n}[:, 1:]",
            f"{n}[:, -1]",
            f"{n}[:, ::2]",
            f"{n}[:, :, None]",
            f"{n}.mT",
            f"F.pad({n}, (0, 0, 1, {rng.choice([0, -1, 1])}))",
            f"{n}.tril()",
            f"{n}.triu(1)",
            f"torch.rot90({n}, 1, [{i}, {j}])",
            f"{n}.diagonal(0, {i}, {j})",
        ]
    for at, k in enumerate(shape):
        for factor in (2, 3, 4):
            if k % factor == 0:
                forms += [f"{n}.unflatten({at}, ({factor}, {k // factor}))", f"{n}.unflatten({at}, ({k // factor}, {factor}))"] * 2
    total = v.tensor.numel()
    for first in (2, 3, 4, 6, 8):
        if total % first == 0:
            forms += [f"{n}.reshape({first}, -1)", f"{n}.reshape(-1, {first})"]
    return g.add(rng.choice(forms), v)


@word(3)
def pieces(g: _Maker) -> bool | None:
    """split, chunk, unbind and their kin."""
    v = g.pick(lambda v: v.rank >= 1 and max(v.shape) > 1)
    if v is None:
        return None
    d = g.rng.choice([i for i, k in enumerate(v.shape) if k > 1])
    size, n = v.shape[d], v.name
    form = g.rng.randrange(5)
    if form == 0:
        first = g.rng.randint(1, size - 1)
        return g.add(f"{n}.split([{first}, {size - first}], {d})", v, outs=2)
    if form == 1:
        parts = g.rng.choice([2, 3, 4])
        return g.add(f"{n}.chunk({parts}, {d})", v, outs=len(v.tensor.chunk(parts, d)))
    if form == 2 and size <= 4:
        return g.add(f"{n}.unbind({d})", v, outs=size)
    if form == 3:
        step = g.rng.choice([1, 2, 3])
        outs = len(v.tensor.split(step, d))
        return g.add(f"{n}.split({step}, {d})", v, outs=outs) if outs <= 4 else None
    if size % 2 == 0:
        a, b = f"{n}.chunk(2, {d})[0]", f"{n}.chunk(2, {d})[1]"
        return g.add(g.rng.choice([f"F.glu({n}, {d})", f"F.silu({a}) * {b}", f"torch.cat([-{b}, {a}], {d})"]), v)
    return None


@word(5)
def reductions(g: _Maker) -> bool | None:
    v = g.pick(lambda v: v.rank >= 1)
    if v is None:
        return None
    n, d, keep = v.name, g.dim(v), g.rng.choice(["", ", keepdim=True"])
    forms = [
        f"{n}.mean({d}{keep})", f"{n}.sum({d}{keep})", f"{n}.amax({d}{keep})", f"{n}.amin({d}{keep})", f"{n}.max({d}{keep}).values", f"{n}.min({d}{keep})[0]",
        f"{n}.prod({d}{keep})", f"{n}.logsumexp({d}{keep})", f"{n}.norm(dim={d}{keep})", f"{n}.norm(p=1, dim={d}{keep})", f"{n}.median({d}{keep})[0]", f"{n}.mean()", f"{n}.sum()", f"{n}.max()", f"{n}.norm()",
        f"torch.softmax({n}, {d})", f"torch.log_softmax({n}, {d})", f"{n}.cumprod({d})", f"torch.logcumsumexp({n}, {d})", f"torch.cummax({n}, {d})[0]",
        f"F.normalize({n}, dim={d})", f"{n} - {n}.mean({d}, keepdim=True)", f"{n} / ({n}.abs().sum({d}, keepdim=True) + 1)", f"{n}.nansum({d}{keep})", f"{n}.argmax({d}{keep})", f"{n}.sort({d})[0]",
        f"{n}.topk({g.rng.randint(1, min(3, v.shape[d]))}, {d})[0]", f"{n}.argsort({d})", f"{n}.kthvalue(1, {d})[0]", f"torch.linalg.vector_norm({n}, {g.rng.choice([1, 2, 3])}, {d}{keep})",
        f"{n}.sort({d}, descending=True)[1]", f"torch.renorm({n}, 2, {d}, 1.0)", f"{n}.aminmax(dim={d})[1]",
    ]  # fmt: skip
    if v.shape[d] > 1:
        forms += [f"{n}.var({d}{keep})", f"{n}.std({d}{keep})", f"{n}.var({d}, correction=0{keep})", f"torch.var_mean({n}, {d})[0]"]
    if v.rank >= 2:
        a, b = g.rng.sample(range(v.rank), 2)
        forms += [
            f"{n}.mean(({a}, {b}){keep})",
            f"{n}.sum(({a}, {b - v.rank}){keep})",
            f"{n}.amax(({a}, {b}){keep})",
            f"{n}.logsumexp(({a}, {b}))",
        ] * 2
    return g.add(g.rng.choice(forms), v)


@word(4)
def products(g: _Maker) -> bool | None:
    a = g.pick(lambda v: v.rank >= 2)
    if a is None:
        return None
    n = a.name
    b = g.pick(lambda v: v.rank >= 2 and (v.shape[-2] == a.shape[-1]))
    forms = [
        f"{n} @ {n}.mT / {a.shape[-1]}",
        f"torch.softmax({n} @ {n}.mT, -1) @ {n}",
        f"torch.einsum('...i,...i->...', {n}, {n})",
        f"torch.einsum('...ij->...ji', {n})",
        f"torch.cdist({n}, {n}.detach() + 1)",
    ]
    if b is not None:
        forms += [f"{n} @ {b.name}", f"torch.matmul({n}, {b.name})"] * 3
    if a.rank == 3:
        forms += [
            f"torch.bmm({n}, {n}.transpose(1, 2))",
            f"torch.einsum('bij,bkj->{g.rng.choice(['bik', 'bki', 'ik', 'bi', 'kj'])}', {n}, {n})",
        ]
        c = g.pick(lambda v: v.rank == 3 and v.shape[0] == a.shape[0] and v.shape[2] == a.shape[2])
        if c is not None:
            forms += [f"torch.bmm({n}, {c.name}.transpose(1, 2))", f"F.scaled_dot_product_attention({n}, {c.name}, {c.name})"] * 2
    if a.rank == 2:
        forms += [
            f"torch.mm({n}, {n}.t())",
            f"torch.outer({n}[0], {n}[-1])",
            f"torch.einsum('ij,kj->ik', {n}, {n})",
            f"torch.addmm({n}.mean(), {n}, {n}.t())",
        ]
    if a.rank == 4:
        mask = g.rng.choice(
            [
                "",
                ", is_causal=True",
                f", attn_mask=torch.ones({a.shape[2]}, {a.shape[2]}, dtype=torch.bool).tril()",
                f", attn_mask=torch.arange({a.shape[2] ** 2}, dtype=torch.double).sin().view({a.shape[2]}, -1)",
            ]
        )
        forms += [f"F.scaled_dot_product_attention({n}, {n} * 0.5, {n}{mask})"] * 2
        if a.shape[1] % 2 == 0:
            half = a.shape[1] // 2
            forms += [f"F.scaled_dot_product_attention({n}, {n}[:, :{half}], {n}[:, {half}:], enable_gqa=True{mask})"] * 2
    return g.add(g.rng.choice(forms), a, b)


@word(4)
def indexing(g: _Maker) -> bool | None:
    v = g.pick(lambda v: v.rank >= 1)
    if v is None:
        return None
    n, rng, d = v.name, g.rng, g.dim(v)
    size, count = v.shape[d], rng.randint(1, 4)
    at = [rng.randrange(size) for _ in range(count)]
    ats = f"torch.tensor({at})"
    d0 = d % v.rank
    forms = [
        f"{n}.index_select({d}, {ats})", f"{n}[{':, ' * d0}{ats}]", f"{n}[{':, ' * d0}torch.tensor({[a - size for a in at]})]",
        f"{n}.gather({d}, {n}.argsort({d}))", f"{n}.gather({d}, {n}.argmax({d}, keepdim=True))", f"torch.take_along_dim({n}, {n}.argsort({d}, descending=True), {d})",
        f"{n}.gather({d}, {n}.topk(1, {d})[1])", f"torch.zeros_like({n}).scatter({d}, {n}.argmax({d}, keepdim=True), 1.0) * {n}",
        f"torch.zeros_like({n}).scatter_add({d}, {n}.argsort({d}), {n})", f"{n}.scatter({d}, {n}.argmin({d}, keepdim=True), 0.5)",
        f"{n}.scatter({d}, {n}.argsort({d}), {n} * 2)", f"{n}.index_add({d}, {ats}, {n}.index_select({d}, {ats}))",
        f"{n}.index_fill({d}, {ats}, 0.3)", f"{n}.index_copy({d}, torch.tensor([{at[0]}]), {n}.narrow({d}, 0, 1) * 2)",
        f"torch.zeros_like({n}).scatter_reduce({d}, {n}.argsort({d}), {n}, 'amax')", f"F.one_hot({n}.argmax({d}), {size + 1}).double() + {n}.mean()",
        f"{n}[{n} > 0].sum()", f"{n}.take(torch.tensor([0, -1]))", f"{n}.where({n} > 0, {n}.mean({d}, keepdim=True))", f"torch.bucketize({n}.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=torch.double)) * {n}",
        f"{n}.masked_fill(torch.arange({v.shape[-1]}) > {v.shape[-1] // 2}, -1.0)",
        f"{n}.scatter({d}, {n}.narrow({d}, 0, 1).argsort({d}), torch.ones({', '.join(str(k + rng.choice([0, 1])) for k in v.shape)}, dtype=torch.double))",
        f"({n}.argmax({d}) % 3).double() * {n}.sum({d})",
    ]  # fmt: skip
    if v.rank >= 2:
        rows, columns = [rng.randrange(v.shape[0]) for _ in range(2)], [rng.randrange(-v.shape[1], v.shape[1]) for _ in range(2)]
        forms += [
            f"{n}[torch.tensor({rows}), torch.tensor({columns})]",
            f"{n}[torch.arange({v.shape[0]}), {n}.flatten(1).argmax(1) % {v.shape[1]}]",
            f"{n}[torch.arange({v.shape[0]})[:, None], torch.tensor({columns})]",
        ] * 2
        forms += [
            f"{n}.index_put((torch.tensor({rows}), torch.tensor({columns})), torch.tensor(0.5, dtype=torch.double))",
            f"{n}.index_put((torch.tensor({rows}),), {n}[:2] * 2, accumulate=True)" if v.shape[0] > 1 else f"{n}[..., [0]]",
        ]
    index = g.pick(
        lambda i: i.tensor.dtype == torch.int64 and i.rank >= 1 and i.tensor.min() >= 0 and i.tensor.max() < v.shape[0], whole=True
    )
    if index is not None:
        forms += [f"{n}[{index.name}]"] * 3
    if v.rank >= 2 and ("keep" in g.scope) and v.shape[:2] == tuple(g.scope["keep"].shape):
        forms += [
            f"{n}.masked_fill(keep{'[..., None]' * (v.rank - 2 and 1)}, 0.0)",
            f"({n} * keep{'[..., None]' * (v.rank - 2 and 1)}).sum(1) / keep.sum(1){'[:, None]' * (v.rank - 2 and 1)}.clamp(min=1)",
            f"{n}[keep].mean(0)",
        ] * 3
    return g.add(rng.choice(forms), v, index)


@word(3)
def writes(g: _Maker) -> bool | None:
    """In place, on a copy, also through views of views."""
    v = g.pick(lambda v: v.rank >= 1 and v.tensor.numel() > 1)
    if v is None:
        return None
    g.count += 1
    c, n, rng = f"v{g.count}", v.name, g.rng
    d = rng.randrange(v.rank)
    size = v.shape[d]
    lead = ":, " * d
    lines = [
        f"{c}.mul_(0.5)", f"{c}[{lead}0] = 0.5", f"{c}[{lead}-1] = {n}[{lead}0] * 2", f"{c}[{lead}1:] += {n}[{lead}:-1]", f"{c}[{lead}::2] = 0.0", f"{c}.add_({n}.mean())", f"{c}.select({d}, -1).fill_(1.0)",
        f"{c}.narrow({d}, 0, {max(1, size // 2)}).mul_(2).narrow({d}, 0, 1).add_(1)", f"{c}.flatten()[:2] = 0.1", f"{c}.clamp_(-0.5, 0.5)", f"{c}.masked_fill_({n} > 0, 0.2)", f"{c}.transpose(0, {d})[0] = 0.3",
        f"{c}[{n} > 0.5] = 0.1", f"{c}.copy_({n}.flip({d}))", f"{c}.zero_()", f"{c}.index_add_({d}, torch.tensor([{rng.randrange(size)}]), {n}.narrow({d}, 0, 1))", f"{c}.scatter_({d}, {n}.argmax({d}, keepdim=True), 0.0)", f"{c}.tanh_()",
        f"{c}[{lead}torch.tensor([0, -1])] = 0.7", f"{c}.view(-1)[1:].mul_(2)", f"{c}.unsqueeze(0)[0, ..., :1].add_(1)", f"{c}.narrow({d}, {size // 2}, {size - size // 2}).copy_({n}.narrow({d}, 0, {size - size // 2}))",
    ]  # fmt: skip
    start = rng.choice([f"{n}.clone()", f"{n} * 1.5", f"torch.zeros_like({n})", f"{n} + 0.1", f"torch.tanh({n}).contiguous()"])
    text = "\n".join([f"{c} = {start}", *rng.sample(lines, rng.choice([1, 1, 2]))])
    if start.startswith("torch.zeros"):
        text += f"\n{c} = {c} + {n}"
    return g.do(text, [c], v)


@word(1)
def resampling(g: _Maker) -> bool | None:
    v = g.pick(lambda v: 3 <= v.rank <= 4)
    if v is None:
        return None
    rank, n = v.rank - 2, v.name
    mode = ["linear", "bilinear"][rank - 1]
    forms = [
        f"F.avg_pool{rank}d({n}, 2, 1)", f"F.max_pool{rank}d({n}, 2, 1)", f"F.max_pool{rank}d({n}, 3, 2, 1)", f"F.avg_pool{rank}d({n}, 3, 1, 1)", f"F.adaptive_avg_pool{rank}d({n}, 2)", f"F.adaptive_max_pool{rank}d({n}, 1)",
        f"F.interpolate({n}, scale_factor=2)", f"F.interpolate({n}, size={[3] * rank}, mode='{mode}')", f"F.interpolate({n}, scale_factor=2, mode='{mode}', align_corners=True)",
        f"F.pad({n}, ({', '.join(['1'] * 2 * rank)}), mode='reflect')", f"F.pad({n}, ({', '.join(['1'] * 2 * rank)}), mode='circular')", f"F.pad({n}, ({', '.join(['1'] * 2 * rank)}), mode='replicate')", f"F.lp_pool{rank}d({n}, 2, 2)",
    ]  # fmt: skip
    if rank == 2:
        forms += [f"F.unfold({n}, 2)", f"F.pixel_unshuffle({n}, 2)", f"F.pixel_shuffle({n}, 2)"]
    return g.add(g.rng.choice(forms), v)


@word(1)
def cells(g: _Maker) -> bool | None:
    """Recurrences and running state, written out or torch's own."""
    v = g.pick(lambda v: v.rank == 3 and v.shape[1] <= 6)
    if v is None:
        return None
    b, _, width = v.shape
    n, h = v.name, g.rng.choice([2, 3, 4, 6])
    form = g.rng.randrange(4)
    g.count += 1
    c = f"v{g.count}"
    if form == 0:
        cell = g.module(f"nn.GRUCell({width}, {h})")
        return g.do(
            f"s{c} = torch.zeros({b}, {h}, dtype=torch.double)\nl{c} = []\nfor t{c} in {n}.unbind(1): s{c} = {cell}(t{c}, s{c}); l{c}.append(s{c})\n{c} = torch.stack(l{c}, 1)",
            [c],
            v,
        )
    if form == 1:
        cell = g.module(f"nn.LSTMCell({width}, {h})")
        return g.do(f"s{c} = None\nfor t{c} in {n}.unbind(1): s{c} = {cell}(t{c}, s{c})\n{c} = torch.cat(s{c}, -1)", [c], v)
    if form == 2:
        kind = g.rng.choice(["GRU", "LSTM", "RNN"])
        both = g.rng.choice(["", ", bidirectional=True"])
        return g.add(f"{g.module(f'nn.{kind}({width}, {h}, batch_first=True{both})')}({n})[0]", v)
    up = g.module(f"nn.Linear({width}, {width}, bias=False)")
    return g.do(f"s{c} = {n}[:, 0]\nfor t{c} in {n}.unbind(1): s{c} = torch.tanh({up}(s{c}) + t{c})\n{c} = s{c}", [c], v)


@word(1)
def buffers(g: _Maker) -> bool | None:
    """A running statistic updated in forward, and read."""
    v = g.pick(lambda v: v.rank >= 1)
    if v is None:
        return None
    g.count += 1
    name = f"b{g.count}"
    shape = v.shape[-1:]
    g.owner.register_buffer(name, torch.zeros(shape, dtype=torch.double))
    g.made.append(f"self.register_buffer('{name}', torch.zeros({', '.join(map(str, shape))}, dtype=torch.double))")
    dims = tuple(range(v.rank - 1))
    mean = f"{v.name}.detach().mean({dims})" if dims else f"{v.name}.detach()"
    g.count += 1
    c = f"v{g.count}"
    return g.do(f"self.{name}.mul_(0.9).add_({mean} * 0.1)\n{c} = {v.name} - self.{name}", [c], v)


@word(2)
def integers(g: _Maker) -> bool | None:
    v = g.pick(lambda v: not v.tensor.is_floating_point() and v.rank >= 1, whole=True)
    if v is None:
        return None
    n, d = v.name, g.dim(v)
    forms = [
        f"{n} + 1", f"{n} % 5", f"{n}.cumsum({d})", f"{n}.flip({d})", f"({n} > 1).to(torch.int64)", f"{n}.double() * 0.3", f"{n}.sum({d})", f"({n} == 2)", f"{n}.clamp(max=4)", f"{n} // 2", f"{n}.double().mean({d})", f"(~({n} > 1)).double()",
        f"{n}.unsqueeze({d})", f"{n}.roll(1, {d})", f"{n}.argsort({d}, stable=True)", f"({n} > 0).any({d})", f"({n} > 0).all({d}).double()", f"{n}.amax({d})", f"(({n} > 0) & ({n} < 3)).double()", f"F.one_hot({n} % 5, 5)", f"({n} != 2).sum()",
        f"{n} / 3", f"{n}.max({d})[0]", f"{n}.to(torch.int32)", f"torch.where({n} > 2, {n}, -{n})",
    ]  # fmt: skip
    return g.add(g.rng.choice(forms), v)
