"""The part of a microbatch and of the model that one rank has."""

from __future__ import annotations

from dataclasses import dataclass, fields

from meshpar.planner.stack import Stack
from meshpar.planner.transformer import Transformer


@dataclass(frozen=True)
class Portion:
    """The part of a microbatch and of the model that one rank has: what a layer's sizes depend on."""

    model: Transformer
    stack: Stack
    dtype: str
    half: str
    """The 16-bit precision of the head and the router."""
    seq: int
    samples: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence_parallel: bool
    recompute: str
    shares: str
    """"zero2" or "zero3" where gradients, or parameters too, are shared out in every microbatch."""
    data: int
    """Data ranks; 0 where layers do not depend on them."""

    def __hash__(self) -> int:
        """Found once: shares are looked up often."""
        if "hash" not in self.__dict__:
            self.__dict__["hash"] = hash(tuple(getattr(self, f.name) for f in fields(self)))
        return int(self.__dict__["hash"])

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on a rank, with sequence parallelism after the gather."""
        return self.samples * self.seq / self.cp

    @property
    def narrow(self) -> int:
        """By how much norms and residuals are divided."""
        return self.tp if self.sequence_parallel else 1

    @property
    def width(self) -> int:
        """Bytes of what products read."""
        return 1 if self.dtype in ("fp8", "nvfp4") else 2
