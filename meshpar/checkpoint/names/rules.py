"""The rules of key maps (`keymap` shows some of each kind): their grammar, read and shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshpar.checkpoint.format.casts import castable
from meshpar.checkpoint.format.files import ITEMSIZE
from meshpar.errors import ConfigError

PAD = "_"
"""The axis of a concatenation that is zeros."""
STACK_EXPERTS = "{p*}.experts.{e}.{n*} [...] -> {p*}.experts.{n*} [e ...]"

Axis = tuple[str, tuple[str, ...]]  # ("name", (a,)), ("factors", (a, b)), ("concat", (q, k, v)), ("rest", ())


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor name pattern and its axes (None: all dims as they are)."""

    pattern: str
    axes: tuple[Axis, ...] | None


@dataclass(frozen=True, slots=True)
class Rule:
    """Several `parts` that make up one `whole`. `merging` tells which side the source is; `tie` marks `parts[0] == whole`."""

    parts: tuple[Term, ...]
    whole: Term
    merging: bool = True
    tie: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    cast: tuple[str, str] | None = None
    text: str = ""

    def inverse(self) -> Rule:
        return replace(self, merging=not self.merging, cast=self.cast[::-1] if self.cast else None, text=f"inverse of {self.text}")

    @property
    def sources(self) -> tuple[Term, ...]:
        return self.parts if self.merging else (self.whole,)

    @property
    def targets(self) -> tuple[Term, ...]:
        return (self.whole,) if self.merging else self.parts

    @property
    def stacked(self) -> tuple[str, ...]:
        """The axes of the whole that are numbers in the names of the parts, in the order of the whole."""
        if self.whole.axes is None:
            return ()
        in_names = set(re.findall(r"\{(\w+)\}", self.parts[0].pattern)) - set(re.findall(r"\{(\w+)\}", self.whole.pattern))
        return tuple(names[0] for kind, names in self.whole.axes if kind == "name" and names[0] in in_names)


def parse(lines: Iterable[str]) -> tuple[Rule, ...]:
    """Read rules, one a line; empty lines and lines that start with # are skipped. Raises ConfigError with the line at fault."""
    rules = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            rules.append(_parse_rule(text))
    return tuple(rules)


def inverted(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules that lead back."""
    return tuple(rule.inverse() for rule in rules)


def show(rule: Rule) -> str:
    """The text of a rule, in the direction it is meant, sizes included."""
    if rule.tie:
        return f"{_show_term(rule.parts[0])} == {_show_term(rule.whole)}"
    left, right = (" + ".join(map(_show_term, side)) for side in (rule.sources, rule.targets))
    cast = f" : {rule.cast[0]} => {rule.cast[1]}" if rule.cast else ""
    sizes = " with " + ", ".join(f"{k}={v}" for k, v in sorted(rule.sizes.items())) if rule.sizes else ""
    return f"{left} -> {right}{cast}{sizes}"


_TERM = re.compile(r"\s*([^\s\[\]]+)\s*(?:\[([^\]]*)\])?\s*")
_AXIS = re.compile(r"\s*(?:(\.\.\.)|\(([^()]*)\)|(\w+))\s*")


def _parse_rule(text: str) -> Rule:
    if "==" in text:
        left, _, right = text.partition("==")
        return Rule((_parse_term(left, text),), _parse_term(right, text), tie=True, text=text)
    body, _, tail = text.partition(" with ")
    body, _, cast = body.partition(" : ")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise ConfigError(f"Key map rule {text!r}: expected `source -> target` or `alias == tensor`.")
    sources = tuple(_parse_term(t, text) for t in left.split(" + "))
    targets = tuple(_parse_term(t, text) for t in right.split(" + "))
    if len(sources) > 1 and len(targets) > 1:
        raise ConfigError(f"Key map rule {text!r}: one side must be a single tensor.")
    merging = len(targets) == 1 and not (len(sources) == 1 and _wholer(sources[0], targets[0]))
    parts, one = (sources, targets[0]) if merging else (targets, sources[0])
    rule = Rule(parts, one, merging, False, _parse_sizes(tail, text), _parse_cast(cast, text), text)
    _check_rule(rule)
    return rule


def _wholer(source: Term, target: Term) -> bool:
    """Whether a one-to-one rule splits: its source has the padding, or an axis that is a number in the target's name."""
    if any(kind == "concat" for kind, _ in source.axes or ()):
        return True
    numbers = set(re.findall(r"\{(\w+)\}", target.pattern)) - set(re.findall(r"\{(\w+)\}", source.pattern))
    return any(kind == "name" and names[0] in numbers for kind, names in source.axes or ())


def _check_rule(rule: Rule) -> None:
    """Every hole of a name must be known from the other side, whichever way the rule is read."""
    stacked = set(rule.stacked)
    sides = [set(re.findall(r"\{(\w+)\*?\}", term.pattern)) for term in rule.parts]
    whole_holes = set(re.findall(r"\{(\w+)\*?\}", rule.whole.pattern))
    for holes in sides:
        if holes - stacked != whole_holes:
            odd = ", ".join(sorted((holes - stacked) ^ whole_holes))
            raise ConfigError(f"Key map rule {rule.text!r}: {{{odd}}} is only on one side, so the rule cannot be undone.")
    if any((term.axes is None) != (rule.whole.axes is None) for term in rule.parts):
        raise ConfigError(f"Key map rule {rule.text!r}: give the axes on both sides, or on none.")


def _parse_term(text: str, rule: str) -> Term:
    hit = _TERM.fullmatch(text)
    if not hit:
        raise ConfigError(f"Key map rule {rule!r}: {text.strip()!r} is not `name` or `name [axes]`.")
    return Term(hit.group(1), None if hit.group(2) is None else tuple(_parse_axes(hit.group(2), rule)))


def _parse_axes(text: str, rule: str) -> Iterable[Axis]:
    at = 0
    while at < len(text):
        hit = _AXIS.match(text, at)
        if not hit or hit.end() == at:
            raise ConfigError(f"Key map rule {rule!r}: {text[at:]!r} is not an axis list like `e (q|k) ...`.")
        rest, group, name = hit.groups()
        if rest:
            yield "rest", ()
        elif name:
            yield "name", (name,)
        else:
            concat = "|" in group
            names = tuple(n.strip() for n in (group.split("|") if concat else group.split()))
            if not names or any(not n.isidentifier() for n in names):
                raise ConfigError(f"Key map rule {rule!r}: ({group}) should be names, (a b) or (a|b).")
            yield ("concat" if concat else "factors"), names
        at = hit.end()


def _parse_sizes(text: str, rule: str) -> dict[str, int]:
    sizes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"Key map rule {rule!r}: `with` expects name=N, found {item!r}.")
        sizes[name.strip()] = int(value)
    return sizes


def _parse_cast(text: str, rule: str) -> tuple[str, str] | None:
    if not text.strip():
        return None
    source, _, target = (part.strip() for part in text.partition("=>"))
    if source not in ITEMSIZE or target not in ITEMSIZE or not castable(source, target):
        raise ConfigError(f"Key map rule {rule!r}: a cast reads `: F16 => F32`.")
    return source, target


def _show_term(term: Term) -> str:
    return term.pattern if term.axes is None else f"{term.pattern} [{' '.join(map(show_axis, term.axes))}]"


def show_axis(axis: Axis) -> str:
    kind, names = axis
    return {"rest": "...", "name": " ".join(names), "factors": f"({' '.join(names)})", "concat": f"({'|'.join(names)})"}[kind]
