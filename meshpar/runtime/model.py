"""The parallel model: an nn.Module with the original names, whose steps run lowered programs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshpar._torch import COMPOSED
from meshpar.capture.state.places import ABSENT
from meshpar.capture.state.taken import without_autocast
from meshpar.compile.program import Program, parts_of, restore
from meshpar.compile.programs import Programs
from meshpar.compile.signature import BatchSignature, flatten
from meshpar.compile.state.following import show
from meshpar.config import ParallelConfig
from meshpar.consensus import check_batch, check_whole
from meshpar.errors import BatchError, ConfigError
from meshpar.init.weights import tensor_groups
from meshpar.mesh import Axis, data_axis, data_rank, stage_axis
from meshpar.ops.load import Tally
from meshpar.ops.random import RandomState
from meshpar.runtime import outside, steps
from meshpar.runtime.asked import Asked
from meshpar.runtime.blocks import Block
from meshpar.runtime.borders import Passage, over_stages
from meshpar.runtime.build import build, copy_values
from meshpar.runtime.caching.forward import CachedForward, settling
from meshpar.runtime.engine import Engine
from meshpar.runtime.evaluation import evaluate
from meshpar.runtime.failures import Together
from meshpar.runtime.generation import Generation
from meshpar.runtime.hooks import StepHooks, refusing
from meshpar.runtime.likeness import Children, Likeness, refuse_method, refuse_module, shown
from meshpar.runtime.names import together as one_module
from meshpar.runtime.outputs import Leave, leaving, returned
from meshpar.runtime.outside import LossFunction
from meshpar.runtime.padding import Filled, Padding
from meshpar.runtime.parameters.gradients import OnMesh
from meshpar.runtime.parameters.specs import convert_state_dicts
from meshpar.runtime.ranges import explaining
from meshpar.runtime.state.variants import Variant, Variants
from meshpar.runtime.state_dicts import EXTRA_STATE, check_state
from meshpar.runtime.tools import Composed, SimulatedState, Untaken, check_surroundings
from meshpar.simulate import is_simulated

_OWN = frozenset({"mesh", "parallel_config", "random", "training"})
"""Attributes of a parallel model that are its own, and not the model's."""


@refusing("register_backward_hook", "register_full_backward_hook", "register_full_backward_pre_hook")
class ParallelModel(Untaken, Likeness, Asked):
    """What `parallelize` returns.

    Parameters are DTensors under the original names with global shapes; plain torch optimizers work on them. Every data rank passes its own
    local batch, ranks that share a data coordinate pass the same one. Tensors as long along dim 0 as the first, in the
    order of the forward's parameters, hold a row per sample; longer ones hold several, where the model runs with nothing else (the patches
    of all images). Others are the same for all samples, and on all ranks.

        loss = pm.train_step(**batch)        forward and backward, gradients summed over the mesh; the loss of the global batch
        loss = pm.eval_step(**batch)         the same loss without gradients
        loss = pm.forward_backward(batch, loss_fn)    the same with a loss of your own
        out  = pm(**batch)                   the model's own output for this data rank's samples; backward from any loss of it
    """

    # Written past nn.Module's own bookkeeping, which would take them for submodules.
    _engine: Engine
    _checked: set[tuple[BatchSignature, int]]
    _together: Together
    _tallies: list[Tally]
    _hooks: StepHooks
    _simulated: bool
    _leave: Leave
    _share: float
    """What a loss of one data rank counts for."""
    _stages: Axis | None
    """The axis of a pipeline."""
    _padding: Padding
    scaled_by: object | None
    """The `GradScaler` whose scale the gradients of the last step were multiplied by."""
    _variants: Variants
    _generation: Generation

    def __init__(
        self, engine: Engine, mesh: DeviceMesh, config: ParallelConfig, programs: Programs, first: Program, together: Together
    ) -> None:
        super().__init__()
        self.__dict__.update(_engine=engine, _checked=set(), _together=together, _tallies=[], _makes=programs)
        self.__dict__.update(_hooks=StepHooks(programs.hooks), scaled_by=None, _simulated=is_simulated())
        self.__dict__.update(_padding=Padding(programs, mesh, config, first.captured))
        self.__dict__.update(_leave=leaving(mesh, config.outputs), _share=1.0 if config.outputs == "cut" else 1.0 / data_rank(mesh)[1])
        self.__dict__["_stages"] = None if programs.schedule is None else stage_axis(mesh)
        settling(programs, mesh)
        self._take_names()
        self.mesh, self.parallel_config = mesh, config
        self.random = RandomState(config.seed)
        self._first = first
        for path, module in programs.skeleton.named_modules():
            self._at(path).training = module.training
        self._show_originals()
        self.__dict__["_variants"] = Variants(self, programs, engine, mesh, self._hooks)
        self._variants.learn(first, config.microbatches)
        self.__dict__["_generation"] = Generation(self, programs.skeleton, mesh, together, self._cached)
        known = frozenset(n for n in programs.skeleton.state_dict() if n.rpartition(".")[2] != EXTRA_STATE)
        convert_state_dicts(self, known, [group for group, _ in tensor_groups(programs.skeleton) if len(group) > 1])

    def _take_names(self) -> None:
        """The trees' own tables, not copies: what FSDP2 swaps there is what this module shows."""
        names = one_module(list(self._engine.trees.values()))
        self.__dict__.update(_modules=names._modules, _parameters=names._parameters, _buffers=names._buffers)
        self.__dict__["_non_persistent_buffers_set"] = names._non_persistent_buffers_set
        self.__dict__["_own"] = names.__dict__.get("_own", {})
        if "_variants" in self.__dict__:
            self._show_originals()
            self._variants.rebind()

    def _show_originals(self) -> None:
        """Every module of this one knows the one that it stands for; loops over modules find those without tensors, too."""
        self.__dict__["_original"] = self._makes.skeleton
        originals = list(self._makes.skeleton.named_modules(remove_duplicate=False))
        bare = [(path, m) for path, m in originals if path and not any(True for _ in (*m.parameters(), *m.buffers()))]
        ids = {id(module) for _, module in bare}
        held = {path: block for path, _ in bare if isinstance(block := self._at(path), Block)}
        blocks = {id(module): held[path] for path, module in bare if path in held}  # (whoever has one from before keeps it)
        blocks |= {id(module): held[path] for path, module in bare if path in held and held[path]._programs}
        for path, module in bare:
            where, _, name = path.rpartition(".")
            if id(module) not in blocks:
                blocks[id(module)] = Block()
                blocks[id(module)].training = module.training
            if path not in held or not held[path]._programs:
                dict.__setitem__(self._at(where)._modules, name, blocks[id(module)])
        for path, module in originals:
            found = self._at(path)
            found.__dict__.update({"_original": module, COMPOSED: Composed()})
            alone = {name for name, child in module._modules.items() if id(child) in ids}
            children = {name: found._modules[name] for name in _in_order(list(found._modules), list(module._modules), alone)}
            if isinstance(found, Block):
                found.__dict__["_modules"] = Children(children)
            else:  # the root's, which is its tree's
                found._modules.clear()
                found._modules.update(children)

    def _at(self, path: str) -> nn.Module:
        """The module at a path, or one that nobody sees where this rank has none."""
        found: nn.Module = self
        for name in path.split(".") if path else ():
            found = found._modules.get(name) or nn.Module()
        return found

    def train(self, mode: bool = True) -> ParallelModel:
        """Set the mode of all modules, as ever. That of a part is set on `pm.get_submodule(path)`; for modules of other ranks' stages, on
        `pm.original_module.get_submodule(path)`."""
        super().train(mode)
        if "_variants" in self.__dict__:
            self._makes.skeleton.train(mode)
            self._variants.modes_are_known()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute of the model: the next step reads it. Raises ConfigError for modules and parameters."""
        if name.startswith("_") or name in _OWN or hasattr(type(self), name) or "_variants" not in self.__dict__:
            super().__setattr__(name, value)
        elif isinstance(value, (nn.Module, nn.Parameter)) or name in self._modules or name in self._parameters:
            refuse_module(name)
        elif name in self._buffers:
            self._set_buffer(name, value)
        else:
            self._makes.skeleton.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self._modules or name in self._parameters:
            refuse_module(name)
        super().__delattr__(name)

    def _set_buffer(self, name: str, value: Any) -> None:
        buffer = self._buffers[name]
        if buffer is None or not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            raise ConfigError(
                f"{name} is a buffer: it can be set to a tensor of the same shape and dtype, as programs were captured for it."
            )
        with torch.no_grad():
            buffer.copy_(value)
        self.spread_buffers()

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model, as programs see it."""
        try:
            return shown(self, name, nn.Module.__getattr__(self, name))
        except AttributeError:
            if "_variants" not in self.__dict__ or name.startswith("_"):
                raise
            if (where := self._variants.lost(name)) is not None:
                raise AttributeError(
                    f"forward puts a tensor into {name}{where}, and a parallel model does not keep it: return it from forward instead."
                ) from None
            if (value := show(self._makes.skeleton, name)) is not ABSENT:
                return value
            if name == "config":
                raise AttributeError("the model has no config. That of parallelize is pm.parallel_config.") from None
            refuse_method(self._makes.skeleton, name)
            raise

    @property
    def original_module(self) -> nn.Module:
        """The module this was made from, its parameters without memory: for what else it has, such as a configuration."""
        return self._makes.skeleton

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of this rank's stages; a rank may have none (then optimizers take `[{"params": pm.parameters()}]`)."""
        return OnMesh(super().parameters(recurse), self.mesh)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Parameters and buffers under their original names; DTensors that tell the order of their elements. Collective.

        Raises ConfigError where hooks of the model would have changed it.
        """
        self._makes.hooks.refuse_state()
        found = super().state_dict(*args, **kwargs)
        return SimulatedState.of(found) if self._simulated and type(found) is OrderedDict else found

    @torch.no_grad()
    def spread_buffers(self) -> None:
        """Give every stage of this rank that has a copy of a buffer the values it has under this module's names, as after loading."""
        own = dict(self.named_buffers())
        for tree in self._engine.trees.values():
            for name, buffer in tree.named_buffers():
                if buffer is not own[name]:
                    buffer.copy_(own[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModel:
        """Another parallel model that runs the same programs, with copies of parameters, gradients and buffers: for averages of weights.

        Hooks on this module are not copied. Collective.
        """
        makes = self._makes.copy()
        engine = build(makes.skeleton, self.mesh, self.parallel_config, self._first, makes.schedule, filled=False)
        new = type(self)(engine, self.mesh, self.parallel_config, makes, self._first, self._together)
        memo |= {id(self): new, **copy_values(self._engine, engine)}
        for program, microbatches, token in reversed(self._variants.programs()):
            if program is not self._first and program.like is None:
                engine.add(program)
                new._variants.learn(program, microbatches, token)
        new.random.load_state_dict(self.random.state_dict())
        return new

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this model on any rank's share, or of the model as it was (whole tensors): every rank keeps its part.

        As in torch, floating values are cast, and without `strict` missing and unexpected names are returned. Names of one tensor must hold
        the same values. Raises StateDictError (a CheckpointError and a RuntimeError) with all that does not fit, ConfigError where hooks
        of the model would have changed it.
        """
        self._makes.hooks.refuse_state()
        check_state(self, self._makes.skeleton, state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict)

    # -- running ---------------------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output for this rank's local batch, plain tensors; the loss in it is that of the global batch.

        Any loss may be computed of it. Data ranks may have losses of their own: gradients are those of their mean over the data ranks
        (`runtime/outputs.py`). `train_step` weighs by labels instead: it is right where ranks have uneven numbers of valid ones.
        """
        with self._together.section("forward"):
            self._hooks.outside_steps(self)
            found = self._forward(args, kwargs)
            self._hooks.done()
            return found

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._makes.schedule is not None and self.training and torch.is_grad_enabled():
            raise BatchError(
                "a pipelined model trains by pm.train_step(**batch), which runs forward and backward of all microbatches in the order of "
                "its schedule and returns the loss; with a loss of your own, pm.forward_backward(batch, loss_fn). To see outputs: "
                "pm.eval(), then with torch.no_grad(): pm(**batch)."
            )
        batch = self._fit(args, kwargs, 1, outputs=True)
        tensors, variant = self._program(batch.args, batch.kwargs, 1)
        program = variant.program
        passage = Passage(self._share)
        with without_autocast(), explaining(program.captured, tensors):
            outputs = self._engine.run(program, self._inputs(program, passage.enter(tensors), 0))
        self.random.advance()
        self._variants.done(variant)
        return restore(program, lambda i: batch.own(i, self._leave(program, outputs[i], i, passage)))

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one step over all microbatches. Returns the loss of the global batch, the same on every rank.

        The loss is the mean over the valid labels of the whole global batch, also where microbatches or ranks have uneven numbers of them;
        gradients equal those of one device on the global batch, and add to what `.grad` holds. Where `microbatches` do not divide the
        samples, or `ParallelConfig(pad_to=)` is set, the batch is filled up by what counts nothing (`runtime/padding.py`).
        Raises BatchError when the model has no loss for this batch, or when ranks disagree about it.
        """
        with self._together.section("train_step"):
            self.__dict__["scaled_by"] = None
            return self._train(args, kwargs)

    def scaled_step(self, scaler: object, scale: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """A `train_step` whose gradients are multiplied by `scale`; the loss it returns is not. For `GradScaler.scale`."""
        with self._together.section("train_step"):
            self.__dict__["scaled_by"] = scaler
            return self._train(args, kwargs, scale)

    def forward_backward(
        self, batch: Any, loss_fn: LossFunction, *, target: Any = None, count: Callable[[Any], Any] | None = None
    ) -> torch.Tensor:
        """Forward and backward of one step with a loss of your own, over all microbatches. Returns it, the same on every rank (float64).

        `batch`: this data rank's, a dict or a tuple of what forward takes. `loss_fn(output, batch)` is called for each microbatch, on the
        ranks of the last stage of a pipeline, with what the model returns for it, plain tensors, and that part of the batch; or of
        `target`, tensors with a row per sample that forward does not take. It gives one number. The loss is the mean of these numbers over
        microbatches and data ranks; with `count`, which says of a local batch (or of its target) what the loss is the mean over, their sum
        by the sum of these counts. Gradients are those of this loss, and add to what `.grad` holds.

            loss = pm.forward_backward(batch, lambda output, batch: my_loss(output.logits, batch["labels"]))
            loss = pm.forward_backward(batch, sum_over_tokens, count=lambda batch: (batch["labels"] != -100).sum())

        Raises BatchError for a batch that does not divide, ConfigError for a loss that is no number.
        """
        with self._together.section("forward_backward"):
            self.__dict__["scaled_by"] = None
            steps.check_gradients()
            self._check_own_hooks()
            with self._hooks.acting(self):
                return self._outside(batch, loss_fn, target, count)

    def _outside(self, batch: Any, loss_fn: LossFunction, target: Any, count: Callable[[Any], Any] | None) -> torch.Tensor:
        if self.parallel_config.outputs == "cut":
            raise ConfigError('forward_backward: outputs="cut" gives DTensors of the global batch, not those of one rank\'s microbatch.')
        pieces = outside.parts(self._makes.skeleton, batch, target, self.parallel_config.microbatches)
        filled = [self._fit(piece.args, piece.kwargs, 1, outputs=True) for piece in pieces]
        first, variant = self._program(filled[0].args, filled[0].kwargs, 1)
        others = [self._values(flatten(one.args, dict(one.kwargs), self.training)[0], variant) for one in filled[1:]]
        program, data = variant.program, data_axis(self.mesh)

        passages = [Passage(self._share, mean=True) for _ in pieces]

        def loss(microbatch: int, outputs: Mapping[int, torch.Tensor]) -> torch.Tensor:
            own, passage = filled[microbatch].own, passages[microbatch]
            output = restore(program, lambda i: own(i, self._leave(program, outputs[i], i, passage)))
            return outside.loss_of(loss_fn, output, pieces[microbatch].target)

        weight = outside.weight(count, batch if target is None else target, len(pieces), data, first[0].device)
        with without_autocast(), explaining(program.captured, first, len(pieces)):
            entered = [passage.enter(tensors) for passage, tensors in zip(passages, [first, *others], strict=True)]
            with over_stages(entered, self._stages) as given:
                inputs = [self._inputs(program, tensors, i) for i, tensors in enumerate(given)]
                total = self._engine.step(program, inputs, backward=True, scale=weight.own, outside=loss)
            total = outside.summed(total, data) * weight.share
        self.random.advance()
        self._variants.done(variant)
        return steps.done(total)

    @torch.no_grad()
    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch, without gradients. Call `eval()` first to switch dropout off, as with any module."""
        with self._together.section("eval_step"):
            self._check_own_hooks()
            return self._step(args, kwargs, backward=False)

    @torch.no_grad()
    def generate(self, *args: Any, **asked: Any) -> Any:
        """`generate` of a transformers model for this data rank's prompts, in its own words: greedy, sampling, beams; the model's tokens.

        With a cache of keys and values where that is proved to be exact for the model, each rank keeping its share; else every token is
        a whole forward, which is warned of (`pm.generation` says why). `use_cache=True` refuses instead. Call `eval()` first to switch
        dropout off. Collective; prompts have one shape on all data ranks. Raises ConfigError for what it cannot do.

            pm.eval().generate(input_ids, max_new_tokens=20)
        """
        return self._generation(args, asked)

    @property
    def generation(self) -> str:
        """How `generate` ran the last time: with a cache of keys and values, and how that is cut, or without, and why."""
        return self._generation.told

    def _cached(self) -> CachedForward:
        inputs = lambda program, tensors: self._inputs(program, tensors, 0)  # noqa: E731
        return CachedForward(self._makes, self._variants, self._engine, self.mesh, inputs_of=inputs, leave=self._leave)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]], *, weight: Callable[[Any], Any]) -> float:
        """The loss over all `batches` of this data rank, each weighed by what its loss is the mean over: the same on every rank.

        `weight(batch)` counts that in a local batch, such as its valid labels: `lambda batch: (batch["labels"][:, 1:] != -100).sum()`.
        Data ranks have equally many batches, of equal shapes. Collective. Call `eval()` first, as with any module.
        """
        return evaluate(self.eval_step, batches, weight, self.mesh)

    def _train(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], scale: torch.Tensor | None = None) -> torch.Tensor:
        steps.check_gradients()
        self._check_own_hooks()
        with self._hooks.acting(self):
            return self._step(args, kwargs, backward=True, scale=scale)

    def _check_own_hooks(self) -> None:
        """Raise ConfigError where hooks on this module would be lost: a step does not call it."""
        self._hooks.check(self)
        if self._forward_hooks or self._forward_pre_hooks:
            raise ConfigError(
                "there are forward hooks on the parallel model: pm(**batch) calls them with the model's own output, a step never does.\n"
                "  Register them on the model, before parallelize: they become part of the program."
            )

    def _step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, backward: bool, scale: torch.Tensor | None = None) -> torch.Tensor:
        count = self.parallel_config.microbatches
        batch = self._fit(args, kwargs, count, outputs=False)
        tensors, variant = self._program(batch.args, batch.kwargs, count)
        program = variant.program
        loss_at = program.captured.loss
        if loss_at is None:
            raise BatchError(
                f"this batch gives no loss. The model returned {returned(program.captured)}; its loss is output.loss, output['loss'], a "
                "scalar, or the only scalar of a tuple. Pass labels if the model computes its loss from them. Of several, or of anything "
                "else, say which: parallelize(..., loss_fn=lambda output, batch: output[0]), or pm.forward_backward(batch, loss_fn)."
            )
        with without_autocast(), explaining(program.captured, tensors, count):
            entered = Passage(self._share, mean=True).enter(tensors)
            with over_stages([entered], self._stages if backward else None) as (given,):
                total = self._engine.step(program, self._parts(program, given, count), backward=backward, scale=scale)
        self.random.advance()
        self._variants.done(variant)
        return steps.done(total)

    def _parts(self, program: Program, tensors: Sequence[torch.Tensor], count: int) -> list[dict[str, Any]]:
        """The values of a graph's placeholders for every microbatch of a step, denominators included."""
        parts = [self._inputs(program, part, i) for i, part in enumerate(parts_of(program.captured, tensors, count))]
        counted = self._engine.counting.count(program, parts)
        return [{**part, **counted} for part in parts]

    def _inputs(self, program: Program, tensors: Sequence[torch.Tensor], microbatch: int) -> dict[str, Any]:
        """The values of a graph's placeholders, by name."""
        found: dict[str, Any] = dict(zip(program.captured.inputs, tensors, strict=False))
        if program.extra.expert_tally is not None:
            self._tallies = [*(self._tallies if microbatch else ()), Tally()]
            found[program.extra.expert_tally] = self._tallies[-1]
        if program.extra.random_key is not None:
            found[program.extra.random_key] = self.random.key(microbatch)
        return found

    def _fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int, *, outputs: bool) -> Filled:
        """The batch, filled up where it does not fit."""
        steps.check_ranks(self._simulated)
        check_surroundings(args, kwargs)
        return self._padding.fit(args, self._makes.ordered(kwargs), microbatches, training=self.training, outputs=outputs)

    def _program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int) -> tuple[list[torch.Tensor], Variant]:
        tensors, signature = flatten(args, dict(kwargs), self.training)
        key = (signature, microbatches)
        closer = None if key in self._checked else lambda: self._check_batch(args, kwargs)
        kept, variant = self._variants.match(signature, microbatches, closer)
        if variant is None:
            why = "what forward reads, which changed" if key in self._variants.known() else steps.kind_of(tensors, self.training)
            variant = self._variants.make(kept, args, kwargs, lambda: steps.say_capture(why, self._makes.seconds))
        captured = variant.program.captured
        if key not in self._checked:
            named = zip(captured.inputs, tensors, strict=False)
            check_whole({name: tensor for name, tensor in named if name not in captured.batch_dims}, self.mesh)
        self._checked.add(key)
        steps.check_devices(tensors, captured.inputs, self.mesh)
        return self._values(tensors, variant), variant

    def _values(self, tensors: Sequence[torch.Tensor], variant: Variant) -> list[torch.Tensor]:
        """What a program takes of a batch, and of what forward reads beside it."""
        dtype = self.parallel_config.precision.compute_dtype
        cast = tensors if dtype is None else [x.to(dtype) if x.is_floating_point() else x for x in tensors]
        return [*cast, *variant.held.inputs()]

    def _check_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        alike = check_batch((args, kwargs), self.mesh)
        if alike and not self._checked:
            steps.say_same_samples(data_rank(self.mesh)[1])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ParallelModel:
        self._check_applicable(fn)
        for tree in self._engine.trees.values():
            tree._apply(fn, recurse)
        self._take_names()
        return self

    def _check_applicable(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The programs compute in the dtypes of the captured model, on the devices of the mesh. Raises ConfigError for any other."""
        for dtype in {p.dtype for p in self.parameters()}:
            made = fn(torch.empty(0, dtype=dtype, device=self.mesh.device_type))
            if made.dtype != dtype:
                raise ConfigError(
                    f"the dtype of a parallel model is fixed ({dtype}): convert the model before parallelize, or compute in another dtype "
                    f"with ParallelConfig(precision=...)."
                )
            if made.device.type != self.mesh.device_type:
                raise ConfigError(
                    f"a parallel model stays on the devices of its mesh ({self.mesh.device_type}): to have it on {made.device.type}, save "
                    f"a checkpoint and load it into a model parallelized on a mesh of that type."
                )


def _in_order(held: Sequence[str], model: Sequence[str], alone: Collection[str]) -> list[str]:
    """Modules with tensors as they are held, in the order of the first rank, and those without behind what is before them in the model."""
    found = [name for name in held if name not in alone]
    for place, name in enumerate(model):
        if name in alone and name in held:
            before = next((other for other in reversed(model[:place]) if other in found), None)
            found.insert(0 if before is None else found.index(before) + 1, name)
    return found
