"""Models of sound, images, graphs, sets, series and recommendations by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConformerBlock(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.ff1, self.ff2 = (nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.SiLU(), nn.Linear(64, dim)) for _ in range(2))
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.conv_norm, self.pointwise, self.depthwise = (
            nn.LayerNorm(dim),
            nn.Conv1d(dim, 2 * dim, 1),
            nn.Conv1d(dim, dim, 5, padding=2, groups=dim),
        )
        self.batch_norm, self.back, self.last = nn.BatchNorm1d(dim), nn.Conv1d(dim, dim, 1), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.pointwise(self.conv_norm(x).transpose(1, 2)), dim=1)
        x = x + self.back(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.last(x + 0.5 * self.ff2(x))


class Conformer(nn.Module):
    """Filter banks to labels, with CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.proj, self.layers, self.head = nn.Linear(32, 32), nn.ModuleList(ConformerBlock() for _ in range(2)), nn.Linear(32, 11)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        x = self.subsample(x[:, None])
        x = self.proj(x.transpose(1, 2).flatten(2))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(logits, targets, torch.full_like(lengths, logits.shape[0]), lengths, zero_infinity=True)


class Wav2Letter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 16, 32, 32]
        layers = [
            nn.Sequential(nn.Conv1d(a, b, k, s, k // 2), nn.ReLU())
            for a, b, k, s in zip(widths, widths[1:], (25, 9, 7, 1), (8, 2, 1, 1), strict=False)
        ]
        self.model = nn.Sequential(*layers, nn.Conv1d(32, 12, 1))

    def forward(self, wave: Tensor) -> Tensor:
        return F.log_softmax(self.model(wave[:, None]), dim=1)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.start = nn.Embedding(32, dim)
        self.filters, self.gates = (nn.ModuleList(nn.Conv1d(dim, dim, 2, dilation=2**i) for i in range(3)) for _ in range(2))
        self.res, self.skip = (nn.ModuleList(nn.Conv1d(dim, dim, 1) for _ in range(3)) for _ in range(2))
        self.end = nn.Conv1d(dim, 32, 1)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, skips = self.start(ids).transpose(1, 2), 0
        for i, (filt, gate, res, skip) in enumerate(zip(self.filters, self.gates, self.res, self.skip, strict=True)):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(filt(padded)) * torch.sigmoid(gate(padded))
            skips, x = skips + skip(y), x + res(y)
        return F.cross_entropy(self.end(F.relu(skips)), targets)


class TemporalConvolutions(nn.Module):
    """Weight-normed causal convolutions."""

    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(norm(nn.Conv1d(a, 16, 3, padding=2 * d, dilation=d)) for a, d in ((4, 1), (16, 2)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)[..., : x.shape[-1]])
        return self.head(x[..., -1])


class ConvLSTM(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dim, self.gates, self.head = dim, nn.Conv2d(1 + dim, 4 * dim, 3, padding=1), nn.Conv2d(dim, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        h = c = frames.new_zeros(frames.shape[0], self.dim, *frames.shape[-2:])
        for frame in frames.unbind(1):
            i, f, o, g = self.gates(torch.cat([frame[:, None], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
                nn.Conv2d(b, b, 3, padding=1),
                nn.ReLU(inplace=True),
            )

        self.down1, self.down2, self.mid = double(3, 8), double(8, 16), double(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.dec2, self.dec1, self.out = double(32, 16), double(16, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.mid(F.max_pool2d(b, 2)))
        y = self.up1(self.dec2(torch.cat([b, y], 1)))
        return self.out(self.dec1(torch.cat([a, y], 1)))


class LucidViT(nn.Module):
    """A class token, learned positions, one projection into q, k and v that is rearranged."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.patch = heads, nn.Sequential(nn.LayerNorm(48), nn.Linear(48, dim), nn.LayerNorm(dim))
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(dim, n * dim, bias=False) for _ in range(2)) for n in (3, 1))
        self.ff = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim)) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        b = image.shape[0]
        x = image.reshape(b, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, 16, 48)
        x = torch.cat([self.cls.expand(b, -1, -1), self.patch(x)], 1) + self.pos
        for qkv, out, ff in zip(self.qkv, self.out, self.ff, strict=True):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + out(((q @ k.mT) * 8**-0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
            x = x + ff(x)
        return self.head(x[:, 0])


class Latents(nn.Module):
    """A few learned latents that read long inputs (Perceiver)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.latents, self.inp = nn.Parameter(torch.randn(6, dim)), nn.Linear(5, dim)
        self.cross, self.own = (nn.MultiheadAttention(dim, 4, batch_first=True) for _ in range(2))
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.inp(x), self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(z, x, x)[0]
        z = z + self.own(z, z, z)[0]
        return self.head(z.mean(1))


class DenseGraph(nn.Module):
    """Graph convolutions with a matrix of neighbours for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, 16) for a in (6, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency + torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        degree = a.sum(-1).rsqrt()
        for layer in self.layers:
            x = F.relu(layer((degree[..., None] * a * degree[:, None]) @ x))
        return self.head(x.mean(1))


class Messages(nn.Module):
    """A graph as a list of edges, the same for all samples: messages are gathered, weighed by a softmax over neighbours, and added."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.score, self.out = nn.Linear(6, 16), nn.Linear(32, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        x = self.inp(x)
        e = F.leaky_relu(self.score(torch.cat([x[:, source], x[:, target]], -1))).exp()
        total = torch.zeros_like(x[..., :1]).index_add(1, target, e)
        return self.out(torch.zeros_like(x).index_add(1, target, e / total[:, target] * x[:, source]))


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.turn, self.head = nn.Linear(32, 9), nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, points: Tensor) -> Tensor:
        first = self.layers(points.transpose(1, 2)).amax(-1)
        turned = points @ (self.turn(first).view(-1, 3, 3) + torch.eye(3, device=points.device, dtype=points.dtype))
        return F.log_softmax(self.head(self.layers(turned.transpose(1, 2)).max(-1)[0]), -1)


class Recommender(nn.Module):
    """DLRM: bags of categories, dense features, and the products of all pairs."""

    def __init__(self, mode: str = "sum", dim: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, dim, mode=mode) for n in (40, 24, 12))
        self.bottom = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, dim), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(dim + 6, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: Tensor, categories: list[Tensor], clicked: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(bag(ids) for bag, ids in zip(self.bags, categories, strict=True))], 1)
        i, j = torch.tril_indices(4, 4, -1)
        pairs = (rows @ rows.mT)[:, i, j]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat([x, pairs], 1)).squeeze(1), clicked)


class WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Embedding(64, 1), nn.Embedding(64, 8)
        self.mlp = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1))

    def forward(self, fields: Tensor, clicked: Tensor) -> Tensor:
        deep = self.deep(fields)
        second = 0.5 * (deep.sum(1).square() - deep.square().sum(1)).sum(-1, keepdim=True)
        return F.binary_cross_entropy_with_logits((self.wide(fields).sum(1) + second + self.mlp(deep.flatten(1))).squeeze(1), clicked)


class TwoTowers(nn.Module):
    """Users and items, each the other samples' negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(32, 16), nn.EmbeddingBag(48, 16, mode="mean")
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        a, b = F.normalize(self.left(self.users(user)), dim=-1), F.normalize(self.right(self.items(item)), dim=-1)
        return F.cross_entropy(a @ b.t() / 0.1, torch.arange(len(user), device=user.device))


class Fields(nn.Module):
    """A radiance field: positions as sines, a skip, colour and density."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.density, self.colour = nn.Linear(24, 32), nn.Linear(56, 32), nn.Linear(32, 1), nn.Linear(35, 3)

    def forward(self, places: Tensor, directions: Tensor) -> Tensor:
        scales = 2.0 ** torch.arange(4, device=places.device, dtype=places.dtype)
        x = (places[..., None] * scales).flatten(-2)
        x = torch.cat([x.sin(), x.cos()], -1)
        h = F.relu(self.second(torch.cat([F.relu(self.first(x)), x], -1)))
        alpha = 1 - torch.exp(-F.softplus(self.density(h)[..., 0]))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)[:, :-1]
        rays = directions[:, None].expand(*h.shape[:2], 3)
        return ((alpha * through)[..., None] * self.colour(torch.cat([h, rays], -1)).sigmoid()).sum(1)


class Operator(nn.Module):
    """A Fourier neural operator: a few modes are multiplied by complex weights."""

    def __init__(self, dim: int = 8, modes: int = 4) -> None:
        super().__init__()
        self.modes, self.lift, self.skip, self.out = modes, nn.Linear(2, dim), nn.Conv1d(dim, dim, 1), nn.Linear(dim, 1)
        self.weight = nn.Parameter(torch.randn(dim, dim, modes, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x).transpose(1, 2)
        spectrum = torch.fft.rfft(y)
        kept = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], torch.view_as_complex(self.weight))
        whole = F.pad(kept, (0, spectrum.shape[-1] - self.modes))
        return self.out(F.gelu(torch.fft.irfft(whole, n=y.shape[-1]) + self.skip(y)).transpose(1, 2))


class Autoencoder(nn.Module):
    """Variational; the noise is an input, so that two runs are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(20, 16), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 20))
        self.mean, self.spread = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        h = F.relu(self.encode(x))
        mean, spread = self.mean(h), self.spread(h)
        back = self.decode(mean + noise * torch.exp(0.5 * spread))
        return F.binary_cross_entropy_with_logits(back, x, reduction="mean") - 0.5 * (1 + spread - mean.pow(2) - spread.exp()).mean()


class Twins(nn.Module):
    """One encoder run on two views, and a loss over the correlations of the batch (Barlow twins)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = ((z - z.mean(0)) / (z.std(0) + 1e-6) for z in (self.net(a), self.net(b)))
        c = x.t() @ y / len(a)
        on = (torch.diagonal(c) - 1).pow(2).sum()
        return on + 0.01 * (c.flatten()[:-1].view(7, 9)[:, 1:].pow(2).sum())


class Series(nn.Module):
    """N-BEATS: blocks that each explain a part and pass on the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for block in self.blocks:
            back, forecast = block(x).split([16, 4], -1)
            x, total = x - back, total + forecast
        return total  # type: ignore[return-value]


class Splines(nn.Module):
    """Kolmogorov-Arnold layers: a learned sum of hat functions on every edge."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(b, a, 6) * 0.1) for a, b in ((8, 16), (16, 3)))
        self.register_buffer("grid", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.einsum("bif,oif->bo", F.relu(1 - (x.tanh()[..., None] - self.grid).abs() / 0.4), weight)
        return x
