"""Names against names: what is accepted, and that complaints are few whatever the number of tensors."""

from __future__ import annotations

import pytest
import torch

import meshpar as mp
from meshpar.init.fit import Fact, Fit, Weights, fit, gathered, pattern, shortened
from meshpar.init.weights import _WORDS

F32, F16 = torch.float32, torch.float16


def held(found: list[str], wanted: list[list[str]], *, dtype: torch.dtype = F32, own: torch.dtype = F32, **options: object) -> Fit:
    names = [n for group in wanted for n in group]
    facts = {n: Fact((2,), own) for n in names}
    return fit(wanted, facts, {n: Fact((2,), dtype) for n in found}, _WORDS, needed=names, **options)  # type: ignore[arg-type]


def test_patterns() -> None:
    assert pattern("h.0.attn.10.w1") == "h.*.attn.*.w1" and pattern("3") == "*"
    assert gathered(["a.0.w", "b", "a.1.w", "c.7.w"]) == {"a.*.w": ["a.0.w", "a.1.w"], "b": ["b"], "c.7.w": ["c.7.w"]}
    assert shortened([f"{c}.w" for c in "abcdefg"], most=2) == "a.w, b.w and 5 more"


def test_any_name_of_three_will_do_and_the_others_are_compared() -> None:
    wanted = [["a", "b", "c"], ["d"]]
    assert held(["b", "d"], wanted).source == {"a": "b", "b": "b", "c": "b", "d": "d"}
    found = held(["c", "a", "b", "d"], wanted)
    assert found.twins == (("a", "b"), ("a", "c")) and not found.complaints
    left = held(["c", "a", "b", "d"], wanted, unexpected=["a", "b"])
    assert left.source["a"] == "c" and not left.twins and left.left == ("a", "b")


def test_one_line_for_each_kind() -> None:
    layers = range(40)
    found = held(
        [f"layers.{i}.w" for i in layers] + [f"layers.{i}.rotary.inv_freq" for i in layers],
        [[f"layers.{i}.w"] for i in layers] + [[f"layers.{i}.b"] for i in layers],
        dtype=F16,
    )
    assert [line.partition(" Did")[0] for line in found.complaints] == [
        "layers.*.b (40 tensors) is missing.",
        "To keep the model's own initialisation of what is missing (a new head): weights=mp.Weights(path, missing=[patterns] or 'skip').",
        "layers.*.rotary.inv_freq (40 tensors) is not in the model.",
        "To leave such tensors in the file: weights=mp.Weights(path, unexpected=[patterns] or 'skip').",
        "layers.*.w (40 tensors) are float16, the model's float32. Build the model in float16, or set a parameter dtype to cast to. That "
        "is config=mp.ParallelConfig(precision=mp.Precision(param_dtype=torch.float32)), or weights=mp.Weights(path, dtype='cast').",
    ]


def test_what_is_accepted() -> None:
    accepted = held(["a", "h.0.bias", "h.1.bias"], [["a"], ["head"]], unexpected=["h.*.bias"], missing=["head"])
    assert accepted.missing == ("head",) and accepted.left == ("h.0.bias", "h.1.bias") and not accepted.complaints
    assert not held(["a", "x"], [["a"], ["head"]], unexpected="skip", missing="skip").complaints
    assert held(["a", "x.y"], [["a"]], ignored=[r"x\.y"]).left == ("x.y",)
    assert not held(["a"], [["a"]], dtype=F16, casts=True).complaints
    still = held(["a", "x"], [["a"], ["head"], ["other"]], unexpected=["x"], missing=["head"]).complaints
    assert still[0].startswith("other is missing.") and len(still) == 2


@pytest.mark.parametrize(("found", "own"), [(torch.float8_e4m3fn, F32), (torch.int64, F32), (F32, torch.int8), (torch.bool, F32)])
def test_other_dtypes_are_never_cast(found: torch.dtype, own: torch.dtype) -> None:
    (line,) = held(["a"], [["a"]], dtype=found, own=own, casts=True).complaints
    assert line.startswith(f"a is {str(found)[6:]}, the model's {str(own)[6:]}.") and "param_dtype" not in line


def test_a_pattern_without_a_match_has_near_misses() -> None:
    lines = held(["a.bias"], [["a.bias"]], unexpected=["a.bais"], missing=["b*"]).complaints
    assert lines == ("unexpected=['a.bais'] matches no name. Did you mean a.bias?", "missing=['b*'] matches no name.")


def test_the_request_is_checked() -> None:
    assert mp.Weights is Weights and Weights("p", unexpected=["a"]).unexpected == ("a",)
    with pytest.raises(mp.ConfigError, match=r"missing='ski': expected 'error', 'skip' or a list of patterns. Did you mean skip\?"):
        Weights("p", missing="ski")
    with pytest.raises(mp.ConfigError, match=r"unexpected=3") as caught:
        Weights("p", unexpected=3, dtype="bf16")  # type: ignore[arg-type]
    assert "dtype='bf16': expected 'error' or 'cast'." in str(caught.value)
    with pytest.raises(mp.ConfigError, match="3 is no path"):
        Weights(3)  # type: ignore[arg-type]
