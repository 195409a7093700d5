"""Key maps: each kind of rule both ways, and everything that is not a bijection refused before any I/O."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from meshpar.checkpoint.convert.hf import from_hf, to_hf
from meshpar.checkpoint.convert.resharding import reshard
from meshpar.checkpoint.format.faults import CorruptError, ImpossibleError
from meshpar.checkpoint.inspection import diff, inspect
from meshpar.checkpoint.move.transfer import Options
from meshpar.checkpoint.names import keymap
from meshpar.checkpoint.names import rules as keyrules
from meshpar.errors import ConfigError
from tests.checkpoint.making import Array, Tensors, bits, load, same, save, save_folder


def there_and_back(root: Path, tensors: Tensors, rules: list[str], options: Options | None = None) -> dict[str, tuple[str, Array]]:
    """Through a folder, a mapped checkpoint on some mesh, another mesh, and a folder again; returns the mapped tensors."""
    save_folder(root / "hf", tensors, 2 if len(tensors) > 1 else 1)
    from_hf(root / "hf", root / "a", "tp=2,ep=2", rules=rules, options=options)
    reshard(root / "a", root / "b", "tp=3,pp=2", options=options)
    to_hf(root / "b", root / "back", options=options)
    assert same(load(root / "back"), tensors)
    assert diff(root / "hf", root / "back").same
    assert same(load(root / "a"), load(root / "b"))
    return load(root / "a")


def f32(*shape: int, seed: int = 0) -> tuple[str, Array]:
    return "F32", bits("F32", shape, seed)


def test_rename(tmp_path: Path) -> None:
    got = there_and_back(tmp_path, {"model.a.w": f32(4, 3), "head": f32(5)}, ["model.{rest*} -> {rest*}"])
    assert sorted(got) == ["a.w", "head"]


def test_experts_are_stacked_and_unstacked_without_being_asked(tmp_path: Path) -> None:
    tensors = {
        f"layers.{i}.mlp.experts.{e}.{n}.weight": f32(6, 4, seed=10 * i + e) for i in range(2) for e in range(11) for n in ("up", "down")
    }
    save_folder(tmp_path / "hf", tensors, 3)
    report = from_hf(tmp_path / "hf", tmp_path / "a", "ep=4,tp=2")
    got = load(tmp_path / "a")
    assert report.notes == ("experts were stacked; to-hf undoes it",)
    assert got["layers.1.mlp.experts.up.weight"][1].shape == (11, 6, 4)
    assert np.array_equal(got["layers.1.mlp.experts.up.weight"][1][10], tensors["layers.1.mlp.experts.10.up.weight"][1])
    to_hf(tmp_path / "a", tmp_path / "back", shard_bytes=500)
    assert same(load(tmp_path / "back"), tensors)


def test_stacked_experts_can_be_unstacked_without_a_record(tmp_path: Path) -> None:
    save(tmp_path / "a", {"mlp.experts.up": f32(3, 4, 5)}, "ep=3")
    to_hf(tmp_path / "a", tmp_path / "hf", unstack=True)
    assert sorted(load(tmp_path / "hf")) == ["mlp.experts.0.up", "mlp.experts.1.up", "mlp.experts.2.up"]
    assert inspect(tmp_path / "hf")["tensors"]["mlp.experts.0.up"]["shape"] == [4, 5]


def test_concatenation_of_unequal_parts(tmp_path: Path) -> None:
    tensors = {f"l.{i}.{n}.weight": f32(rows, 5, seed=rows + i) for i in range(2) for n, rows in (("q", 8), ("k", 2), ("v", 2))}
    rule = "{p*}.q.weight [q h] + {p*}.k.weight [k h] + {p*}.v.weight [v h] -> {p*}.qkv.weight [(q|k|v) h]"
    got = there_and_back(tmp_path, tensors, [rule])
    assert np.array_equal(got["l.1.qkv.weight"][1], np.concatenate([tensors[f"l.1.{n}.weight"][1] for n in "qkv"]))


def test_stack_and_concatenate_at_once(tmp_path: Path) -> None:
    tensors = {f"x.{e}.{n}": f32(3, 4, seed=e) for e in range(4) for n in ("gate", "up")}
    got = there_and_back(tmp_path, tensors, ["x.{e}.gate [f h] + x.{e}.up [f h] -> x.gate_up [e (f|f) h]"])
    assert got["x.gate_up"][1].shape == (4, 6, 4)
    assert np.array_equal(got["x.gate_up"][1][2, 3:], tensors["x.2.up"][1])


def test_concatenation_along_another_dim(tmp_path: Path) -> None:
    tensors = {"a": f32(3, 4), "b": f32(3, 2)}
    got = there_and_back(tmp_path, tensors, ["a [i x] + b [i y] -> ab [i (x|y)]"])
    assert np.array_equal(got["ab"][1], np.concatenate([tensors["a"][1], tensors["b"][1]], 1))


def test_transpose(tmp_path: Path) -> None:
    tensors = {"h.0.c_fc.weight": f32(6, 10), "h.1.c_fc.weight": f32(6, 10, seed=1)}
    got = there_and_back(tmp_path, tensors, ["h.{i}.c_fc.weight [i o] -> h.{i}.fc.weight [o i]"])
    assert np.array_equal(got["h.1.fc.weight"][1], tensors["h.1.c_fc.weight"][1].T)


def test_a_cycle_of_three_dims_is_not_its_own_inverse(tmp_path: Path) -> None:
    tensors = {"w": f32(3, 4, 5)}
    got = there_and_back(tmp_path, tensors, ["w [a b c] -> w [c a b]"])
    assert np.array_equal(got["w"][1], tensors["w"][1].transpose(2, 0, 1))


def test_stacking_into_a_middle_dim_is_a_transpose(tmp_path: Path) -> None:
    tensors = {f"x.{e}": f32(3, 4, seed=e) for e in range(5)}
    got = there_and_back(tmp_path, tensors, ["x.{e} [o i] -> x [o e i]"])
    assert np.array_equal(got["x"][1], np.stack([tensors[f"x.{e}"][1] for e in range(5)], 1))


def test_reordering_fused_factors(tmp_path: Path) -> None:
    tensors = {"qkv": f32(24, 5)}
    got = there_and_back(tmp_path, tensors, ["qkv [(three n d) h] -> qkv [(n three d) h] with three=3, n=4"])
    wanted = tensors["qkv"][1].reshape(3, 4, 2, 5).transpose(1, 0, 2, 3).reshape(24, 5)
    assert np.array_equal(got["qkv"][1], wanted)


def test_padding_is_added_checked_and_dropped(tmp_path: Path) -> None:
    tensors = {"embed": f32(11, 4)}
    got = there_and_back(tmp_path, tensors, ["embed [v h] -> embed [(v|_) h] with _=5"])
    assert got["embed"][1].shape == (16, 4) and not got["embed"][1][11:].any()
    got["embed"][1][13, 2] = 1
    save(tmp_path / "c", got)
    with pytest.raises(CorruptError, match="should be padding, but holds values other than zero"):
        to_hf(tmp_path / "c", tmp_path / "d", rules=["embed [(v|_) h] -> embed [v h] with _=5"])


def test_a_cast_is_undone(tmp_path: Path) -> None:
    values = np.arange(6, dtype="f2").view("u2")
    got = there_and_back(tmp_path, {"scale": ("F16", values)}, ["scale -> scale : F16 => F32"])
    assert got["scale"][0] == "F32" and got["scale"][1].view("f4").tolist() == list(range(6))
    save(tmp_path / "c", {"scale": ("F32", np.array([0.1], "f4").view("u4"))})
    with pytest.raises(ImpossibleError, match="scale: 1 values would change when cast to F16"):
        to_hf(tmp_path / "c", tmp_path / "d", rules=["scale -> scale : F32 => F16"])


def test_tied_tensors_are_stored_once_and_come_back(tmp_path: Path) -> None:
    weight = f32(6, 4)
    tensors = {"model.embed": weight, "head": weight, "x": f32(3)}
    got = there_and_back(tmp_path, tensors, ["head == model.embed", "model.{r*} -> {r*}"])
    assert sorted(got) == ["embed", "x"]
    assert inspect(tmp_path / "a")["aliases"] == {"head": "embed"}


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "hf", {"embed": f32(6, 4), "head": f32(6, 4, seed=9)})
    with pytest.raises(CorruptError, match="head is declared tied to embed, but they differ"):
        from_hf(tmp_path / "hf", tmp_path / "a", "tp=1", rules=["head == embed"])
    assert not (tmp_path / "a").exists()


def test_large_stacks_are_transposed_in_little_memory(tmp_path: Path) -> None:
    tensors = {f"x.{e}": f32(300, 200, seed=e) for e in range(8)}
    rule = "x.{e} [o i] -> x [e i o]"
    got = there_and_back(tmp_path, tensors, [rule], Options(memory=1 << 20, slab=1 << 16))
    assert np.array_equal(got["x"][1][5], tensors["x.5"][1].T)


def test_a_transpose_that_does_not_fit_the_memory_says_what_would(tmp_path: Path) -> None:
    def transpose(mib: int) -> None:
        from_hf(tmp_path / "hf", tmp_path / "a", "tp=1", rules=["w [o i] -> w [i o]"], options=Options(memory=mib << 20))

    save_folder(tmp_path / "hf", {"w": f32(600, 400)})
    said = r"w \[600, 400\] must be transposed in memory: --max-memory (\d+)MiB or more would do"
    with pytest.raises(ImpossibleError, match=said) as error:
        transpose(1)
    match = re.search(said, str(error.value))
    assert match is not None
    enough = int(match[1])
    with pytest.raises(ImpossibleError, match=f"{enough}MiB or more would do"):
        transpose(enough - 1)
    transpose(enough)


TENSORS = {"a.w": ("F32", (4, 6)), "b.w": ("F32", (2, 6)), "x.0": ("F32", (3, 2)), "x.1": ("F32", (3, 2)), "y": ("BF16", (12, 2))}
REFUSED = {
    "q.{n} -> {n}": "matches nothing",
    "a.w -> b.w": "gives two tensors the name b.w",
    "{l}.w -> w": "is only on one side, so the rule cannot be undone",
    "x.{i} [o k] + y [o k] -> xy [(o|o) k]": "is only on one side",
    "a.w [q h] + b.w [k h] -> ab [q h]": "an axis must say how",
    "a.w [q h] + b.w [k h] -> ab [(q|k|v) h]": "joins 3 tensors",
    "a.w [q h] + b.w [q h] -> ab [(q|q) h]": "does not fit",
    "a.w [q h] + y [k h] -> ab [(q|k) h]": "differ in dtype|siblings|does not fit",
    "a.w [o i j] -> a.w [j i o]": "has 3 axes in the rule and 2 dims",
    "y [(n d) h] -> y [(d n) h]": "sizes of d, n are not known",
    "y [(n d) h] -> y [(d n) h] with n=5": "a dim of 12 does not fit",
    "a.w [o i] -> a.w [o]": "is only on one side|are only on one side",
    "y -> y : BF16 => I32": "a cast reads",
    "a.w -> a.w : F16 => F32": "only F16 can be cast",
    "a.w": "expected `source -> target`",
    "a.w + b.w -> x + y": "one side must be a single tensor",
    "a.w [(] -> a.w [o]": "is not an axis list",
    "a.w [o i] -> a.w": "give the axes on both sides",
    "x.{e} [o i] -> x [e o i] with o=x": "`with` expects name=N",
}


@pytest.mark.parametrize("rule", REFUSED)
def test_maps_that_are_not_bijections_are_refused(rule: str) -> None:
    message = REFUSED[rule]
    with pytest.raises((ConfigError, ImpossibleError), match=message):
        keymap.apply(keyrules.parse([rule]), TENSORS)


def test_a_pattern_that_would_take_too_much_on_the_way_back_is_recorded_name_by_name() -> None:
    mapped = keymap.apply(keyrules.parse(["{l}.w -> {l}"]), TENSORS)
    assert sorted(mapped.tensors) == ["a", "b", "x.0", "x.1", "y"]
    assert mapped.rules == ("a.w -> a", "b.w -> b")


def test_an_incomplete_stack_is_refused() -> None:
    tensors = {"x.0": ("F32", (3, 2)), "x.2": ("F32", (3, 2))}
    with pytest.raises(ImpossibleError, match=r"2 of 3 tensors are there, e.g. x.0, x.2"):
        keymap.apply(keyrules.parse(["x.{e} [...] -> x [e ...]"]), tensors)
    tensors = {"x.0": ("F32", (3, 2)), "x.1": ("F32", (3, 3))}
    with pytest.raises(ImpossibleError, match=r"x.1 is \[3, 3\], its siblings are \[3, 2\]"):
        keymap.apply(keyrules.parse(["x.{e} [...] -> x [e ...]"]), tensors)


def test_rules_are_recorded_with_their_sizes() -> None:
    rules = keyrules.parse(["{p}.q [q h] + {p}.k [k h] -> {p}.qk [(q|k) h]"])
    same_sizes = {"a.q": ("F32", (4, 2)), "a.k": ("F32", (1, 2)), "b.q": ("F32", (4, 2)), "b.k": ("F32", (1, 2))}
    assert keymap.apply(rules, same_sizes).rules == ("{p}.q [q h] + {p}.k [k h] -> {p}.qk [(q|k) h] with h=2, k=1, q=4",)
    other = same_sizes | {"b.q": ("F32", (3, 2)), "b.k": ("F32", (2, 2))}
    assert len(keymap.apply(rules, other).rules) == 2


def test_a_rule_shown_and_read_again_is_the_same_rule() -> None:
    for text in (
        "a.{i} [o i] -> b.{i} [i o]",
        "x.{e}.g [f h] + x.{e}.u [f h] -> x.gu [e (f|f) h]",
        "qkv [(a b c) h] -> qkv [(b a c) h] with a=3, b=2",
        "h == e",
        "s -> s : F16 => F32",
    ):
        (rule,) = keyrules.parse([text])
        assert keyrules.show(rule) == text
        if not rule.tie:
            (back,) = keyrules.parse([keyrules.show(rule.inverse())])
            assert keyrules.show(back.inverse()) == text or not back.merging
