"""Reports in shells and notebooks."""

from __future__ import annotations

import torch
from torch import nn

import meshpar as mp
from meshpar.report.text import Legible, Readable, as_html


def test_models_plans_and_reports() -> None:
    with mp.simulate(2):
        example = (torch.randn(4, 8),)
        pm = mp.parallelize(nn.Linear(8, 8), mp.make_mesh("tp=2"), example=example, loss_fn=lambda out, _: out.square().mean())
        html = pm._repr_html_()
        assert "<summary><b>Mesh tp=2" in html and "weight" in html
        assert repr(pm.plan).startswith("Plan(tp=2: 2 parameters, ") and pm.plan.hash in repr(pm.plan)
        assert "<summary><b>Memory of a rank" in pm.memory()._repr_html_() and repr(pm.memory()) == str(pm.memory())
    report = mp.verify(nn.Linear(8, 8), "tp=2", example, loss_fn=lambda out, _: out.square().mean())
    assert report._repr_html_() == as_html(str(report)) and repr(report) == str(report)


# -- in notebooks --------------------------------------------------------------------------------------------------------------------------


def test_sections_can_be_folded() -> None:
    html = as_html("Mesh dp=2\n  a < b\n\nParameters\n  w  [2]\n\nRemark")
    assert html.count("<details") == 2 and html.count("<details open>") == 1 and html.index("open") < html.index("Parameters")
    assert "a &lt; b" in html and html.count("<pre") == html.count("</pre>") == 2 and "<b>Remark</b>" in html


def test_what_is_legible_is_shown_as_it_reads() -> None:
    class Report(Legible):
        def __str__(self) -> str:
            return "Memory\n  1 B"

    assert repr(Report()) == "Memory\n  1 B" and Report()._repr_html_() == as_html("Memory\n  1 B")
    assert repr(Readable("x\ny")) == "x\ny" and "<b>x</b>" in Readable("x\ny")._repr_html_()
