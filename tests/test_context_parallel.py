"""Context parallelism: a decoder whose sequence is cut over `cp` is the decoder on one device, with every trap that was seen elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meshpar as mp
from meshpar.errors import ConfigError, PlanError
from meshpar.graph.facts import Info, facts
from meshpar.graph.text import lines
from meshpar.simulate import local_tensors
from tests.pool import Pool

B, S, H, V = 4, 16, 32, 37


class Attention(nn.Module):
    """4 query heads on 2 of keys and values. `kind` says what a query sees."""

    def __init__(self, kind: str, kv: int = 2) -> None:
        super().__init__()
        self.kind, self.kv = kind, kv
        self.q, self.k, self.v, self.o = nn.Linear(H, H), nn.Linear(H, 8 * kv), nn.Linear(H, 8 * kv), nn.Linear(H, H)
        self.bias = nn.Parameter(torch.randn(4, 2 * S) / 4) if kind == "bias" else None
        self.sink = nn.Parameter(torch.randn(4)) if kind == "sink" else None

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = (layer(x).view(b, s, self.kv, 8).transpose(1, 2).repeat_interleave(4 // self.kv, 1) for layer in (self.k, self.v))
        out = self._attend(q, k, v, self._seen(s, padding))
        return self.o(out.transpose(1, 2).reshape(b, s, H))

    def _seen(self, s: int, padding: Tensor | None) -> Tensor | None:
        at = torch.arange(s)
        causal = at <= at[:, None]
        if self.kind == "window":
            causal = causal & (at > at[:, None] - 5)
        elif self.kind == "documents":  # of lengths 7 and 9: one begins on a rank and ends on another
            causal = causal & ((at >= 7) == (at >= 7)[:, None])
        elif self.kind == "prefix":
            causal = causal | (at < 3)
        elif self.kind == "all":
            return None
        return causal if padding is None else causal & padding[:, None, None, :].bool()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        if self.kind == "is_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.bias is not None:  # by distance, trained
            at = torch.arange(q.shape[2])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self._added(seen) + self.bias[:, (at[:, None] - at) % (2 * S)])
        if self.sink is None and self.kind != "softcap":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        scores = q @ k.transpose(-1, -2) / 8**0.5
        scores = 20 * torch.tanh(scores / 20) + self._added(seen)
        if self.sink is None:
            return scores.softmax(-1) @ v
        sink = self.sink.view(1, 4, 1, 1).expand(q.shape[0], 4, q.shape[2], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v

    def _added(self, seen: Tensor | None) -> Tensor:
        assert seen is not None
        return torch.where(seen, 0.0, -1e9)


class Decoder(nn.Module):
    """Two blocks, positions, a tied head; the loss shifts the labels inside."""

    def __init__(self, kind: str = "causal", *, kv: int = 2, shift: str = "labels", dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(V, H), nn.Embedding(64, H)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": Attention(kind, kv), "n": nn.LayerNorm(H), "m": nn.Linear(H, H)}) for _ in range(2))
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.embed.weight
        self.shift, self.dropout = shift, nn.Dropout(dropout)

    def forward(self, ids: Tensor, labels: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = x + self.dropout(block["a"](block["n"](x), padding))  # type: ignore[index]
            x = x + torch.tanh(block["m"](x))  # type: ignore[index]
        logits = self.head(x)
        if self.shift == "labels":
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            return {"loss": F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1)), "logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)), "logits": logits}


def batch(samples: int = B, length: int = S, *, padding: bool = False) -> dict[str, Tensor]:
    """Labels are ignored in other numbers on every part of the sequence."""
    torch.manual_seed(1)
    ids = torch.randint(0, V, (samples, length))
    labels = ids.masked_fill(torch.rand(samples, length) < torch.linspace(0, 0.9, length), -100)
    found = {"ids": ids, "labels": labels}
    if padding:
        found["padding"] = (torch.arange(length) < torch.tensor([[length], [length - 3], [5], [length // 2]])).long()
    return found


KINDS = ["causal", "is_causal", "all", "window", "documents", "prefix", "bias", "sink", "softcap"]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_query_sees(kind: str) -> None:
    torch.manual_seed(0)
    mp.verify(Decoder(kind), "cp=2", batch(padding=kind in ("causal", "softcap"))).raise_if_failed()


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "kind, kv, context",
    [
        ("causal", 2, "ring"),
        ("window", 4, "heads"),
        ("all", 1, "ring"),
        ("is_causal", 4, "ring"),
        ("prefix", 2, "ring"),
    ],
)
def test_forms(kind: str, kv: int, context: Any) -> None:
    torch.manual_seed(0)
    mp.verify(Decoder(kind, kv=kv), "cp=4", batch(), config=mp.ParallelConfig(context=context)).raise_if_failed()


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("mesh", "context"), [("cp=2,tp=2", "auto"), ("dp=2,cp=2", "ring"), ("dp=2,cp=2,tp=2", "ring")])
def test_meshes(mesh: str, context: Any) -> None:
    torch.manual_seed(0)
    mp.verify(Decoder("window", shift="logits"), mesh, batch(), config=mp.ParallelConfig(context=context)).raise_if_failed()


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("kind", "mesh", "context", "chunks"),
    [
        ("documents", "cp=2", "ring", 4),
        ("causal", "dp=2,cp=2", "ring", 8),
        ("sink", "cp=2,tp=2", "gather", 4),
        ("window", "cp=4", "ring", 4),
    ],
)
def test_pieces(kind: str, mesh: str, context: Any, chunks: int) -> None:
    torch.manual_seed(0)
    config = mp.ParallelConfig(context=context, context_chunks=chunks)
    result = mp.verify(Decoder(kind), mesh, batch(padding=kind == "causal"), config=config)
    result.raise_if_failed()


def test_pieces_that_do_not_divide_are_refused_or_padded() -> None:
    torch.manual_seed(0)
    with mp.simulate(2):
        mesh = mp.make_mesh("cp=2")
        with pytest.raises(PlanError, match=r'context_chunks=4: .* 12 positions .* Pad them to 16 .*"auto", or one of 1, 2, 6\.'):
            mp.parallelize(Decoder(), mesh, example=batch(length=12), config=mp.ParallelConfig(context_chunks=4))
        config = mp.ParallelConfig(context_chunks=4, pad_to=1)
        pm = mp.parallelize(Decoder(), mesh, example=batch(length=12), config=config)
        assert "dealt out in 4 pieces a rank, as was asked for" in pm.explain()
        assert pm(**batch(length=12))["logits"].shape == (B, 12, V)
    with pytest.raises(ConfigError, match="context_chunks=3: .* an even number of them: 2 or 4"):
        mp.ParallelConfig(context_chunks=3)


def test_heads_are_cut_again_by_an_inner_axis() -> None:
    """An all-to-all to heads leaves each rank some of them, of which `tp` takes its own: nothing is done twice."""
    torch.manual_seed(0)
    config = mp.ParallelConfig(context="heads")
    mp.verify(Decoder("causal", kv=4), "cp=2,tp=2", batch(), config=config).raise_if_failed()
    with mp.simulate(4):
        pm = mp.parallelize(Decoder("causal", kv=4), mp.make_mesh("cp=2,tp=2"), config=config, example=batch())
        text = str(pm.explain())
        assert "heads" in text and "Repeated on all 2 cp ranks: 0%" in text and "Repeated on all 2 tp ranks: 0%" in text
        sent = sum(
            c.nbytes for c in pm.comms() if c.kind == "all_to_all" and c.axis == "cp" and "blocks" in c.module and c.phase == "forward"
        )
        assert sent == 2 * 4 * (B * S * H * 4 // 2) // 4  # 2 blocks of q, k, v and the result: half of half of what this tp rank has


@pytest.mark.sweep(1)
@pytest.mark.parametrize("length, layout", [(12, "head-tail"), (14, "contiguous")])
def test_lengths_that_divide(length: int, layout: str) -> None:
    """14 positions divide by 2 ranks, not by twice as many pieces."""
    torch.manual_seed(0)
    mp.verify(Decoder(), "cp=2", batch(length=length)).raise_if_failed()
    with mp.simulate(2):
        pm = mp.parallelize(Decoder(), mp.make_mesh("cp=2"), example=batch(length=length))
        cuts = [t for node in pm.plan.axis("cp").nodes.values() for t in node.outs if getattr(t, "segments", ())]  # type: ignore[union-attr]
        assert any(units < 0 for cut in cuts for units, _ in cut.segments) == (layout == "head-tail")
        said = "4 does not divide the 14 positions: they are cut in one piece each, and the last rank has 1.5 times the mean"
        assert (said in str(pm.explain())) == (layout == "contiguous")


def test_a_length_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with (
        mp.simulate(4),
        pytest.raises(PlanError, match=r"cp=4 does not divide the 15 positions of ids .*pad_to=1.*or pad the batch to 16 "),
    ):
        mp.parallelize(Decoder(), mp.make_mesh("cp=4"), example=batch(length=15))
    with mp.simulate(4), pytest.raises(PlanError, match=r"pad the batch to 20 .*; better to 24, so that causal attention is shared out"):
        mp.parallelize(Decoder(), mp.make_mesh("cp=4"), example=batch(length=17))


def test_what_leaves_the_model_is_in_true_order() -> None:
    torch.manual_seed(0)
    model = Decoder().double()
    right = model(**batch())["logits"]
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("cp=2"), example=batch())
        out = pm(**batch())
        for logits in local_tensors(out["logits"]).values():
            torch.testing.assert_close(logits, right, rtol=1e-12, atol=1e-12)


def test_parts_of_masks_are_made_as_parts() -> None:
    """No rank makes a table of all pairs of positions."""
    with mp.simulate(2):
        pm = mp.parallelize(Decoder("prefix"), mp.make_mesh("cp=2"), config=mp.ParallelConfig(context="gather"), example=batch())
        shapes = {info.shape for node in pm._first.graph.nodes if isinstance(info := facts(node).info, Info)}
        assert not any(shape[-2:] == (S, S) for shape in shapes) and any(shape[-2:] == (S // 2, S) for shape in shapes)


def test_dropout_with_a_causal_call_is_not_taken_for_a_local_causal_one() -> None:
    """With random masks drawn inside it attention has all positions of some heads, or none is cut."""

    class Drawn(Attention):
        def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5 if self.training else 0.0)

    torch.manual_seed(0)
    model = Decoder("is_causal", kv=4)
    for block in model.blocks:
        block["a"].__class__ = Drawn  # type: ignore[index]
    with mp.simulate(2):
        pm = mp.parallelize(model, mp.make_mesh("cp=2"), config=mp.ParallelConfig(context="gather"), example=batch())
        assert "gather" not in str(pm.explain()).split("Attention over")[1].split("Repeated")[0]


def test_the_report_names_forms_bytes_and_what_is_repeated() -> None:
    with mp.simulate(4):
        pm = mp.parallelize(Decoder("window", kv=4), mp.make_mesh("cp=4"), config=mp.ParallelConfig(context="ring"), example=batch())
        text, key = str(pm.explain()), B * 4 * (S // 4) * 8 * 4
        assert "blocks.*.a  x2  halo" in text and "Repeated on all 4 cp ranks: 0%" in text
        sent = [c for c in pm.comms() if c.kind == "halo"]
        assert {(c.axis, c.phase) for c in sent} == {("cp", "forward"), ("cp", "backward")} and len(sent) == 4
        assert all(c.nbytes == 3 * key for c in sent)  # rank 1 sends positions 2 and 3 to ranks 2 and 3, and 12 and 13 to rank 0
        pm = mp.parallelize(Decoder("causal", kv=4), mp.make_mesh("cp=4"), config=mp.ParallelConfig(context="ring"), example=batch())
        sent = [c for c in pm.comms() if c.kind == "ring"]
        assert [c.nbytes for c in sent if c.phase == "forward"] == [3 * 2 * key] * 2
        assert [c.nbytes for c in sent if c.phase == "backward"] == [7 * 2 * key] * 2


def test_gathered_keys_and_values_are_one_message() -> None:
    """Also under a mask with no form of its own, with grouped heads: they are sent before they are repeated."""
    for kind in ("is_causal", "prefix"):
        with mp.simulate(4):
            model = Decoder(kind, kv=1 if kind == "prefix" else 4)
            pm = mp.parallelize(model, mp.make_mesh("cp=4"), config=mp.ParallelConfig(context="gather"), example=batch())
            key = B * (1 if kind == "prefix" else 4) * (S // 4) * 8 * 4
            sent = [c for c in pm.comms() if c.axis == "cp" and c.nbytes == 3 * 2 * key and ".a" in c.module]
            assert sorted((c.kind, c.phase) for c in sent) == sorted(
                2 * [("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")]
            )


class Sorting(nn.Module):
    """Rows of experts that the model itself puts in order (or that need no order), for `F.grouped_mm`."""

    def __init__(self, *, routed: bool) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(V, H), nn.Linear(H, 4), nn.Linear(H, V)
        self.experts, self.routed = nn.Parameter(torch.randn(4, H, H) / 6), routed

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        rows = torch.tanh(x).reshape(-1, H)
        if self.routed:
            weights, own = self.router(rows).softmax(-1).max(-1)
            order, ends = own.argsort(stable=True), F.one_hot(own, 4).sum(0).cumsum(0).to(torch.int32)
            y = torch.zeros_like(rows).index_copy(0, order, F.grouped_mm(rows[order], self.experts, offs=ends)) * weights[:, None]
        else:
            n = rows.shape[0]
            y = F.grouped_mm(rows, self.experts, offs=torch.tensor([n // 8, n // 4, n // 2, n], dtype=torch.int32))
        return {"loss": F.cross_entropy(self.head(x + y.view_as(x)).reshape(-1, V), labels.reshape(-1))}


@pytest.mark.parametrize("mesh, routed", [("cp=2", True), ("cp=2", False), ("dp=2", False)])
def test_rows_that_a_model_sorts_itself_are_not_those_of_a_dispatch(mesh: str, routed: bool) -> None:
    """A part of them is of some experts only: the ends of all experts' rows do not add up from those of parts."""
    mp.verify(Sorting(routed=routed), mesh, batch()).raise_if_failed()


class Pointwise(nn.Module):
    """Convolutions over one position at a time, in groups, as some models write their matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.one, self.two = nn.Conv1d(H, 2 * H, 1, groups=4), nn.Conv1d(2 * H, H, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        x = x + self.two(torch.tanh(self.one(x.transpose(1, 2)))).transpose(1, 2)
        return {"loss": F.cross_entropy(self.head(x).reshape(-1, V), labels.reshape(-1))}


def test_convolutions_of_single_positions_are_cut_along_them() -> None:
    mp.verify(Pointwise(), "cp=2", batch()).raise_if_failed()
    with mp.simulate(2):
        pm = mp.parallelize(Pointwise(), mp.make_mesh("cp=2"), example=batch())
        assert "Repeated on all 2 cp ranks: 0% of a rank's arithmetic" in str(pm.explain())
        assert not [c for c in pm.comms() if c.kind in ("all_gather", "all_to_all")]


class Packed(Decoder):
    """Documents of odd lengths, each with positions of its own, given with the batch; a router's loss counts what is no padding."""

    def __init__(self) -> None:
        super().__init__("documents")
        self.router = nn.Linear(H, 4)

    def forward(self, ids: Tensor, labels: Tensor, documents: Tensor, places: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x, at = self.embed(ids) + self.place(places), torch.arange(ids.shape[1])
        alike = documents[:, None, :, None] == documents[:, None, None, :]
        for block in self.blocks:
            layer = block["a"]  # type: ignore[index]
            q, k, v = (m(x).view(*ids.shape, -1, 8).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
            k, v = (one[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for one in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=alike & (at <= at[:, None]))
            x = x + layer.o(y.transpose(1, 2).reshape(x.shape))
        loss = F.cross_entropy(self.head(x)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        return {"loss": loss + 0.1 * self._balance(x, (documents > 0).to(x.dtype))}

    def _balance(self, x: Tensor, counts: Tensor) -> Tensor:
        """Of experts over the tokens that are not padding, as mixtures of experts take it."""
        weights = self.router(x).softmax(-1)
        chosen = F.one_hot(weights.argmax(-1), 4).to(x.dtype)
        share, mean = ((one * counts[..., None]).sum((0, 1)) / counts.sum() for one in (chosen, weights))
        return 4 * (share * mean).sum()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mesh, context", [("cp=2", "gather"), ("cp=4", "auto"), ("cp=2", "heads")])
def test_packed_documents_of_odd_lengths_with_padding_and_a_router(mesh: str, context: Any) -> None:
    """Documents begin on one rank and end on another; the last positions are padding, which no loss may count; the loss is not times cp."""
    torch.manual_seed(0)
    lengths = [[7, 5, 1], [3, 11], [1, 1, 1, 9], [16]]
    documents, places = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.long)
    for row, own in enumerate(lengths):
        numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(own)])
        documents[row, : len(numbers)], places[row, : len(numbers)] = numbers, torch.cat([torch.arange(n) for n in own])
    given = batch() | {"documents": documents, "places": places}
    given["labels"] = given["labels"].masked_fill((documents == 0) | (places == 0), -100)
    mp.verify(Packed(), mesh, given, config=mp.ParallelConfig(context=context)).raise_if_failed()


def test_what_ranks_compare_of_a_graph_says_nothing_of_places_in_memory() -> None:
    with mp.simulate(2):
        pm = mp.parallelize(Decoder("window"), mp.make_mesh("cp=2"), example=batch())
        text = "\n".join(lines(pm._first.captured))
        assert "windowed_attention" in text and " at 0x" not in text


def test_logits_that_are_cut_off_by_one_are_not_gathered() -> None:
    torch.manual_seed(0)
    mp.verify(Decoder(shift="logits"), "cp=2", batch()).raise_if_failed()
    with mp.simulate(2):
        pm = mp.parallelize(Decoder(shift="logits"), mp.make_mesh("cp=2"), example=batch())
        assert not [c for c in pm.comms() if c.kind == "all_gather" and not c.region]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("length, mesh", [(16, "cp=2"), (16, "cp=4"), (14, "cp=2")], ids=["head-tail", "four", "contiguous"])
def test_dropout_draws_the_numbers_of_one_device(length: int, mesh: str) -> None:
    """They belong to positions, however many ranks have them."""

    def step(mesh: str) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model, given = Decoder("is_causal", dropout=0.3).double(), batch(length=length)
        with mp.simulate(int(mesh[-1])):
            pm = mp.parallelize(model.train(), mp.make_mesh(mesh), example=given)
            loss = pm.train_step(**given)
            grad = mp.full_grad(pm.get_parameter("blocks.0.m.weight"))
            assert grad is not None
            return float(local_tensors(loss)[0]), local_tensors(grad)[0]

    (right, wanted), (loss, grad) = step("dp=1"), step(mesh)
    assert abs(loss - right) < 1e-12 * abs(right)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


Trained = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


def loaded(mesh: str, load: str | None, save: str) -> Trained:
    """All parameters, and what the optimizer knows of each, after a step or from a checkpoint; then saved."""
    torch.manual_seed(0 if load is None else 1)
    pm = mp.parallelize(Decoder("window"), mp.make_mesh(mesh), example=batch(), config=mp.ParallelConfig(data_parallel="zero1"))
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    if load is None:
        pm.train_step(**batch())
        optimizer.step()
    else:
        mp.checkpoint.load(load, pm, optimizer)
    mp.checkpoint.save(save, pm, optimizer)
    parameters = dict(pm.named_parameters())
    moments = [{k: mp.full_tensor(v) for k, v in optimizer.state[p].items() if v.dim()} for p in parameters.values()]
    return {name: mp.full_tensor(p) for name, p in parameters.items()}, moments


def test_checkpoints_go_to_other_meshes_and_come_back(gloo: Pool, tmp_path: Path) -> None:
    """Bit for bit: from cp to tp, and to cp again."""
    there, between, back = (str(tmp_path / name) for name in "abc")
    wanted = gloo.run(loaded, "cp=2", None, there)[0]
    for mesh, load, save in (("tp=2", there, between), ("cp=2", between, back)):
        for parameters, moments in gloo.run(loaded, mesh, load, save):
            assert all(torch.equal(parameters[name], wanted[0][name]) for name in wanted[0])
            assert all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(moments, wanted[1], strict=True))
            assert any(bool(v.any()) for one in moments for v in one.values())


def test_what_is_asked_for_is_checked() -> None:
    with pytest.raises(ConfigError, match="context='rings': one of auto, gather, heads, ring"):
        mp.ParallelConfig(context="rings")  # type: ignore[arg-type]
    assert mp.ParallelConfig.from_megatron({"cp_comm_type": "p2p"}).context == "ring"


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "mesh, config",
    [
        ("cp=2", {"data_parallel": "zero3", "microbatches": 2, "context": "ring"}),
        ("cp=2", {"data_parallel": "replicate", "recompute": "full"}),
        ("pp=2,cp=2", {"microbatches": 2, "schedule": "zbv", "context": "ring"}),
        ("dp=2,cp=2", {"data_parallel": "zero1", "recompute": "selective"}),
    ],
    ids=["zero3", "replicate", "pipeline", "zero1"],
)
def test_processes(mesh: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    report = mp.verify(Decoder("window"), mesh, batch(8), config=mp.ParallelConfig(**config), processes=True)
    report.raise_if_failed()
