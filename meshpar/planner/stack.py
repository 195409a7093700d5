"""Software stacks as data: which attention kernel, what hides behind computation, how wide gradients and optimizer states are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from meshpar.errors import ConfigError, near


@dataclass(frozen=True)
class Stack:
    """What a training program does that neither the model nor the mapping says."""

    name: str
    attention: str
    """"unfused" (scores in memory), or a fused kernel with an efficiency of its own: "flash2", "cudnn"."""
    fused: bool
    """Norms, biases, activations and losses are fused kernels; else each is several passes over memory."""
    dropout: bool
    """Dropout is on: masks are kept and read."""
    hides_tp: bool
    """Collectives over tp run in pieces beside the products that need them."""
    hides_dp: bool
    """Gradients are summed while backward runs, parameters gathered while forward runs."""
    hides_p2p: bool
    """Transfers between stages run beside computation."""
    moe: str
    """Name of the constant for what the host costs per expert layer and pass."""
    gradient: int
    """Bytes of a gradient in memory."""
    gradient_sum: int
    """Bytes of a gradient on the wire when it is summed over the data ranks."""
    parameter: int
    """Bytes of a parameter in the copy that products read."""
    optimizer: int
    """Bytes of the optimizer's states per parameter, with the master copy: 12 for Adam with fp32 master weights."""
    selective: str
    """What `recompute="selective"` recomputes: "attention" (its core), "products" (about every second product), or "cheap" (everything
    but products, attention and collectives)."""
    activations: float
    """Measured activations / those of the closed form."""
    source: str
    logits: float = 12.0
    """Bytes per logit at the peak of the loss: logits and their gradient in 16 bits and in fp32; less where one kernel reuses them."""
    hides_ep: bool = False
    """The exchange of tokens runs beside another microbatch's computation."""
    dedups: bool = False
    """A token that several experts of one domain want crosses to it once."""
    permutations: float = 4.0
    """Reads and writes of the routed tokens beside the exchange, per pass; 2 where the dispatcher sends straight into expert order."""
    adapters: str = "all"
    """Rings over several servers use "all" adapters of the ranks they have in a server, or "one"."""
    cuts: str = "evenly"
    """Where stages end: "evenly" where layers divide; where the cost so far, embedding and head counted, is "nearest" to an equal share; or
    with the layer that goes "past" it."""

    def counted(self) -> Stack:
        """The same for operators that were counted one by one: what eager kernels read and write more is in their bytes already.

        A fused attention runs as one, also under stacks that had none.
        """
        return replace(self, fused=True, attention="flash2" if self.attention == "unfused" else self.attention)


_MEGATRON = "Megatron-LM / Megatron Core documentation"
STACKS: Mapping[str, Stack] = MappingProxyType(
    {
        stack.name: stack
        for stack in (
            Stack(
                *("megatron-2020", "unfused", True, True, False, False, False, "moe 2025", 2, 2, 2, 14, "attention", 1.0),
                "Megatron-LM of 2020: fp16 gradients, all-reduce after backward (arXiv 1909.08053, images/tables.tex)",
            ),
            Stack(
                *("megatron-2021", "unfused", True, True, False, False, False, "moe 2025", 4, 2, 2, 12, "attention", 1.0),
                "arXiv 2104.04473, 2205.05198: fused softmax and bias-gelu, no overlap of tp or dp",
            ),
            Stack(
                *("deepspeed-2021", "unfused", True, True, False, True, False, "moe 2025", 2, 2, 2, 12, "attention", 1.0),
                "ZeRO-3 as run for arXiv 2104.04473, table 2: its rates are those of flat rings over one adapter",
                adapters="one",
            ),
            Stack(
                *("megatron-2024", "cudnn", True, False, True, True, True, "moe 2025", 4, 4, 2, 12, "attention", 1.0),
                f"{_MEGATRON} 2024-2025: user buffers for tp, distributed optimizer with overlap, fp32 gradients (arXiv 2504.14960)",
            ),
            Stack(
                *("nemo-2024", "flash2", True, False, True, True, True, "moe 2025", 2, 2, 2, 12, "attention", 1.0),
                "NeMo 24.03-24.07: 16-bit gradients (grad_sync_dtype), attention of early 2024",
            ),
            Stack(
                *("nemo-2025", "cudnn", True, False, True, True, True, "moe 2025", 2, 2, 2, 12, "attention", 1.0),
                "NeMo 25.04, Megatron-Bridge 25.09 performance recipes: grad_reduce_in_fp32=False, fused cross entropy",
                logits=6.0,
            ),
            Stack(
                *("nemo-2026", "cudnn", True, False, True, True, True, "moe 2026", 2, 2, 2, 12, "attention", 1.0),
                "Megatron-Bridge 26.08 performance recipes: as 2025, CUDA graphs of the router, fused dispatcher (hybridep)",
                logits=6.0,
                dedups=True,
                permutations=2.0,
            ),
            Stack(
                *("torchtitan", "flash2", True, False, False, True, True, "moe 2025", 4, 4, 4, 8, "products", 1.0),
                "torchtitan, compiled blocks: fp32 parameters, gradients and states, bf16 gathers (FSDP2)",
            ),
            Stack(
                *("torchtitan-eager", "flash2", False, False, False, True, True, "moe 2025", 4, 4, 4, 8, "products", 1.25),
                "torchtitan without compile",
            ),
            Stack(
                *("meshpar", "flash2", False, False, False, True, True, "moe 2025", 4, 4, 4, 8, "cheap", 1.0),
                "this package: the captured graph in eager mode, FSDP2, fp32 parameters and states; what pieces hide of tp costs about as "
                "much in smaller products (a dry run counts both)",
                cuts="nearest",
            ),
            Stack(
                *("nanotron", "flash2", False, False, False, False, False, "moe 2025", 4, 4, 2, 12, "attention", 1.4),
                "huggingface/nanotron: fp32 accumulated gradients, eager blocks, flash attention 2, stages by get_block_compute_costs",
                cuts="past",
            ),
        )
    }
)
"""Name -> stack. `parameter + gradient + optimizer` is the bytes per parameter of an unsharded state."""
DEFAULT = "megatron-2024"


def stack(name: str | Stack) -> Stack:
    """A stack by name. Raises `ConfigError` with all names.

    >>> stack("megatron-2024").attention
    'cudnn'
    """
    if isinstance(name, Stack):
        return name
    if name not in STACKS:
        raise ConfigError(f"no software stack {name!r}.{near(str(name), STACKS)} Known: {', '.join(STACKS)}. Or give a Stack of your own.")
    return STACKS[name]
