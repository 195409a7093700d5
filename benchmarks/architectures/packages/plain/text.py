"""Language models by hand: of the styles of nanoGPT, llama, mamba-minimal, x-transformers, RetNet, RWKV and the tutorials of torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LENGTH = 64, 32, 4, 12


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """The usual loss of a language model, over tokens that are not -1."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, HEADS, C // HEADS).transpose(1, 2) for part in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention()
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(VOCABULARY, WIDTH),
            "wpe": nn.Embedding(LENGTH, WIDTH),
            "h": nn.ModuleList(NanoBlock() for _ in range(2)),
        }
        self.transformer = nn.ModuleDict(parts | {"ln_f": nn.LayerNorm(WIDTH)})
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, next_token(logits, targets)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table[None, : x.shape[1], None]
    return torch.view_as_real(turned).flatten(3)


class LlamaBlock(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv, self.dim = kv_heads, WIDTH // HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, kv_heads * self.dim, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.w2 = nn.Linear(48, WIDTH, bias=False)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = rms(x, self.norm1)
        q = apply_rotary(self.wq(y).view(b, s, HEADS, self.dim), table)
        k = apply_rotary(self.wk(y).view(b, s, self.kv, self.dim), table)
        v = self.wv(y).view(b, s, self.kv, self.dim)
        k, v = (t[:, :, :, None].expand(b, s, self.kv, HEADS // self.kv, self.dim).reshape(b, s, HEADS, self.dim) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = F.softmax((torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.dim) + mask).float(), dim=-1).type_as(q)
        x = x + self.wo(torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, s, -1))
        y = rms(x, self.norm2)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class ComplexLlama(nn.Module):
    """Rotary tables of complex numbers, as an attribute that is neither parameter nor buffer."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.tok_embeddings, self.output = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(LlamaBlock(kv_heads) for _ in range(2))
        self.norm = nn.Parameter(torch.ones(WIDTH))
        freqs = 1.0 / (10000.0 ** (torch.arange(0, WIDTH // HEADS, 2).float() / (WIDTH // HEADS)))
        self.freqs_cis = torch.polar(torch.ones(LENGTH, len(freqs)), torch.outer(torch.arange(LENGTH).float(), freqs))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        mask = torch.triu(torch.full((tokens.shape[1], tokens.shape[1]), float("-inf"), device=tokens.device), diagonal=1).type_as(h)
        for layer in self.layers:
            h = layer(h, self.freqs_cis, mask)
        return next_token(self.output(rms(h, self.norm)), targets)


class MambaBlock(nn.Module):
    def __init__(self, state: int = 4, rank: int = 4) -> None:
        super().__init__()
        self.inner, self.state, self.rank = 2 * WIDTH, state, rank
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * self.inner, bias=False), nn.Linear(self.inner, WIDTH, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, 4, groups=self.inner, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(self.inner, rank + 2 * state, bias=False), nn.Linear(rank, self.inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float().repeat(self.inner, 1)))
        self.D = nn.Parameter(torch.ones(self.inner))

    def forward(self, x: Tensor) -> Tensor:
        x, res = self.in_proj(x).split([self.inner, self.inner], dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2))
        delta, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        return self.out_proj(self._scan(x, F.softplus(self.dt_proj(delta)), -torch.exp(self.A_log), B, C) * F.silu(res))

    def _scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        driven = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        state = torch.zeros(u.shape[0], self.inner, self.state, device=u.device, dtype=u.dtype)
        out = []
        for i in range(u.shape[1]):
            state = decay[:, i] * state + driven[:, i]
            out.append(torch.einsum("bdn,bn->bd", state, C[:, i]))
        return torch.stack(out, dim=1) + u * self.D


class Mamba2Block(nn.Module):
    """One projection into z|x|B|C|dt, one convolution over x|B|C, and the chunked scan of matrices, in one chunk."""

    def __init__(self, heads: int = 8, groups: int = 2, state: int = 4) -> None:
        super().__init__()
        self.heads, self.groups, self.state, self.inner = heads, groups, state, 2 * WIDTH
        self.conv_dim = self.inner + 2 * groups * state
        self.in_proj = nn.Linear(WIDTH, self.inner + self.conv_dim + heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, 4, groups=self.conv_dim, padding=3)
        self.dt_bias, self.A_log = nn.Parameter(torch.rand(heads)), nn.Parameter(torch.log(torch.arange(1, heads + 1).float()))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm, self.out_proj = nn.Parameter(torch.ones(self.inner)), nn.Linear(self.inner, WIDTH, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        b, s, _ = u.shape
        z, xBC, dt = torch.split(self.in_proj(u), [self.inner, self.conv_dim, self.heads], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2)).transpose(1, 2)[:, :s])
        x, B, C = torch.split(xBC, [self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        x = x.reshape(b, s, self.heads, -1)
        B, C = (t.reshape(b, s, self.groups, self.state).repeat_interleave(self.heads // self.groups, dim=2) for t in (B, C))
        steps = torch.cumsum(-torch.exp(self.A_log) * dt, dim=1)
        decay = torch.exp(
            (steps[:, :, None] - steps[:, None]).masked_fill(torch.ones(s, s, device=u.device).triu(1).bool()[..., None], float("-inf"))
        )
        y = torch.einsum("blhn,bshn,blsh,bsh,bshp->blhp", C, B, decay, dt, x) + x * self.D[:, None]
        return self.out_proj(rms(y.reshape(b, s, -1) * F.silu(z), self.norm))


class Stack(nn.Module):
    """A language model of residual mixers."""

    def __init__(self, mixer: type[nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(mixer() for _ in range(depth))
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(depth + 1))

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(rms(x, norm))
        return next_token(rms(x, self.norms[-1]) @ self.embedding.weight.t(), targets)


class Retention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkvg, self.out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.GroupNorm(HEADS, WIDTH)
        self.register_buffer("gamma", 1 - 2.0 ** (-5 - torch.arange(HEADS)))

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v, g = self.qkvg(x).chunk(4, dim=-1)
        q, k, v = (t.reshape(b, s, HEADS, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        n = torch.arange(s, device=x.device)
        decay = torch.where(n[:, None] >= n, self.gamma[:, None, None] ** (n[:, None] - n).clamp(min=0), 0.0)
        y = ((q @ k.mT * (c // HEADS) ** -0.5) * decay) @ v
        return self.out(F.silu(g) * self.norm(y.transpose(1, 2).reshape(b * s, c)).reshape(b, s, c))


class TimeMix(nn.Module):
    """RWKV's mixing over time, written as its recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(3, WIDTH))
        self.decay, self.first = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.r, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        r, k, v = (layer(x * m + before * (1 - m)) for layer, m in zip((self.r, self.k, self.v), self.mix, strict=True))
        top = bottom = torch.zeros_like(x[:, 0])
        out = []
        for t in range(x.shape[1]):
            e = torch.exp(k[:, t])
            out.append((top + torch.exp(self.first) * e * v[:, t]) / (bottom + torch.exp(self.first) * e))
            fade = torch.exp(-torch.exp(self.decay))
            top, bottom = fade * top + e * v[:, t], fade * bottom + e
        return self.out(torch.sigmoid(r) * torch.stack(out, 1))


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.cumsum(torch.einsum("bshd,bshe->bshde", k, v), dim=1)
        norm = torch.einsum("bshd,bshd->bsh", q, torch.cumsum(k, dim=1)) + 1e-6
        return self.out((torch.einsum("bshd,bshde->bshe", q, state) / norm[..., None]).reshape(b, s, -1))


class Hyena(nn.Module):
    """Long convolutions by the FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH, LENGTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        q, k, v = self.proj(x).chunk(3, dim=-1)
        spectrum = torch.fft.rfft((k * v).transpose(1, 2), n=2 * s) * torch.fft.rfft(self.filter[:, :s], n=2 * s)
        return self.out(q * torch.fft.irfft(spectrum, n=2 * s)[..., :s].transpose(1, 2))


class XAttention(nn.Module):
    """Of the style of x-transformers: one norm of scale and g, queries and keys normalised, one key head, alibi, gated values."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = WIDTH // HEADS
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * self.dim, bias=False)
        self.scale = nn.Parameter(torch.full((HEADS, 1, 1), 2.0))
        self.slopes = nn.Parameter(torch.tensor([2.0**-i for i in range(1, HEADS + 1)]).view(HEADS, 1, 1))
        self.to_gate, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.ff_in, self.ff_out = nn.Linear(WIDTH, 2 * 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, HEADS, self.dim).transpose(1, 2)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        places = torch.arange(n, device=x.device)
        bias = -(places[:, None] - places).abs() * self.slopes
        sim = (torch.einsum("bhid,bjd->bhij", q, k) * self.scale + bias).masked_fill(places[:, None] < places, -torch.finfo(x.dtype).max)
        out = torch.einsum("bhij,bjd->bhid", sim.softmax(-1), v).transpose(1, 2).reshape(b, n, -1)
        x = x + self.to_out(out * self.to_gate(x).sigmoid())
        y, gate = self.ff_in(x).chunk(2, dim=-1)
        return self.ff_out(y * F.gelu(gate))


class Translation(nn.Module):
    """torch's own nn.Transformer, with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, src: Tensor, tgt: Tensor, targets: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], device=tgt.device)
        y = self.transformer(
            self.source(src), self.target(tgt), tgt_mask=mask, src_key_padding_mask=src == 0, memory_key_padding_mask=src == 0
        )
        return next_token(self.generator(y), targets)


class Encoder(nn.Module):
    """torch's TransformerEncoder, sequence first, norm first, and the first token's class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids.t()))[0])


class Recurrent(nn.Module):
    """An LSTM, GRU or RNN over words; the decoder may share the embedding."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, 2, batch_first=True, bidirectional=bidirectional)
        self.decoder = nn.Linear(WIDTH * (2 if bidirectional else 1), VOCABULARY)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return next_token(self.decoder(self.rnn(self.encoder(ids))[0]), targets)


class Cells(nn.Module):
    """An LSTMCell stepped by hand, with attention over its past (Bahdanau)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.query, self.key, self.energy = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, 1)
        self.out = nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        h = c = x.new_zeros(x.shape[0], WIDTH)
        past, out = [], []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            past.append(h)
            seen = torch.stack(past, 1)
            weight = self.energy(torch.tanh(self.query(h)[:, None] + self.key(seen))).softmax(1)
            out.append(torch.cat([h, (weight * seen).sum(1)], -1))
        return next_token(self.out(torch.stack(out, 1)), targets)


class HandMixture(nn.Module):
    """Experts in a ModuleList, a loop over them and the tokens that chose each."""

    def __init__(self, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen, self.gate = chosen, nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, chosen = torch.topk(self.gate(rows), self.chosen)
        weights, out = F.softmax(weights, dim=1), torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(chosen == i)
            out[token] += weights[token, nth, None] * expert(rows[token])
        return out.view_as(x)
