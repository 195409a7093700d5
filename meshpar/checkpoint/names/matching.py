"""Names of tensors under the rules of a key map: which rule takes which tensors together, and what holes in a name stand for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from meshpar.checkpoint.format.faults import ImpossibleError
from meshpar.checkpoint.names.rules import Rule
from meshpar.errors import near

Group = tuple[int, dict[str, str], dict[tuple[int, tuple[int, ...]], str]]
"""Which rule, what its holes stand for, and its tensors: (source term, numbers of the stack) -> name."""


def grouped(rules: Sequence[Rule], names: Collection[str], *, strict: bool = True) -> tuple[list[Group], list[str]]:
    """For every rule, the sets of tensors it takes together; and the tensors that no rule takes."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], dict[tuple[int, tuple[int, ...]], str]] = {}
    used, left = [False] * len(rules), []
    stacked = [rule.stacked for rule in rules]
    literal, patterns = _by_name(rules)
    for name in names:
        for index in sorted([*literal.get(name, ()), *patterns]):
            rule = rules[index]
            hit = None if rule.tie and not rule.merging else _match(rule, stacked[index], name)
            if hit is None or (rule.tie and fill(rule.whole.pattern, hit[1]) not in names):
                continue
            used[index] = True
            part, bound, place = hit
            key = (index, tuple(sorted(bound.items())))
            if (part, place) in found.setdefault(key, {}):
                raise ImpossibleError(f"{rule.text}: {name} and {found[key][part, place]} would be the same part.")
            found[key][part, place] = name
            break
        else:
            left.append(name)
    idle = [rule for rule, hit in zip(rules, used, strict=True) if not hit and not (rule.tie and not rule.merging)]
    if idle and strict:
        wanted = idle[0].sources[0].pattern
        raise ImpossibleError(f"The rule {idle[0].text!r} matches nothing.{near(wanted, names)}")
    return [(index, dict(bound), members) for (index, bound), members in found.items()], left


def _by_name(rules: Sequence[Rule]) -> tuple[dict[str, list[int]], list[int]]:
    """Rules that name their sources outright, by name, since there may be as many as tensors; and the others."""
    literal: dict[str, list[int]] = {}
    patterns = []
    for index, rule in enumerate(rules):
        if any("{" in term.pattern for term in rule.sources):
            patterns.append(index)
        else:
            for name in {term.pattern for term in rule.sources}:
                literal.setdefault(name, []).append(index)
    return literal, patterns


def _match(rule: Rule, stacked: tuple[str, ...], name: str) -> tuple[int, dict[str, str], tuple[int, ...]] | None:
    for part, term in enumerate(rule.sources):
        hit = regex(term.pattern, stacked).fullmatch(name)
        if hit:
            bound = dict(hit.groupdict())
            place = tuple(int(bound.pop(axis)) for axis in stacked if axis in bound)
            return part, bound, place
    return None


@lru_cache(maxsize=512)
def regex(pattern: str, stacked: tuple[str, ...]) -> re.Pattern[str]:
    out, seen = "", set()
    for text, name, star in re.findall(r"([^{}]+)|\{(\w+)(\*?)\}", pattern):
        if text:
            out += re.escape(text)
        elif name in seen:
            out += f"(?P={name})"
        else:
            seen.add(name)
            out += f"(?P<{name}>{r'0|[1-9][0-9]{0,8}' if name in stacked else '.+' if star else '[^.]+'})"
    return re.compile(out)


def fill(pattern: str, bound: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: bound[m.group(1)], pattern)


def bind(pattern: str, bound: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: bound.get(m.group(1), m.group(0)), pattern)


def matches(rule: Rule, name: str) -> bool:
    """Whether a rule takes a tensor of this name."""
    return _match(rule, rule.stacked, name) is not None
