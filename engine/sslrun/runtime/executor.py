"""Runs optimizer steps: forward, backward, finite check, update; saves and loads the whole state.

`Executor` is the interface, with everything that does not depend on where parameters live; `LocalExecutor` runs in one
process. If a loss or gradient is not finite on any rank, the step changes neither weights nor optimizer state on any.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sslkernels.ema_update import ema_update_
from sslrun.contract import Batch, Loss, Method, Progress, Rewrite
from sslrun.errors import Diverged, UsageError
from sslrun.randomness import Phase, seed_torch
from sslrun.runtime import compilation, distributed, network_draws
from sslrun.runtime.host_copies import to_cpu
from sslrun.runtime.late_value import LateValue
from sslrun.runtime.mismatch import Mismatch
from sslrun.runtime.strided_convolutions import avoid_strides

T = TypeVar("T")
Copy = Callable[[Tensor], Tensor]  # of a tensor to the CPU
COUNTER = "step"  # the one entry of a parameter's state in torch's optimizers that has not the parameter's shape


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step.

    Attributes:
        applied: whether the weights changed; None if the host learns that one step later (the device itself leaves them
            as they are where it must).
        grad_norm: 0-d, on the device: global norm of the gradient before clipping, of the `norm_type` that is clipped.
    """

    applied: bool | None
    grad_norm: Tensor


class Executor(ABC):
    """One optimizer step: `targets`, then `forward` and `backward` for each micro-batch, then `step`.

    Args:
        method: moved to `device`, convolutions to channels-last.
        optimizer: over parameters of `method`; parameters of momentum teachers belong to no group.
        device: where to compute.
        precision: "bf16" computes under autocast, parameters stay float32; "fp64" makes parameters, buffers and views
            float64.
        accumulation: micro-batches per step.
        grad_clip: largest norm of the gradient of a part of the parameters; None for no clipping.
        norm_type: order of that norm; 2 is the Euclidean one, infinity the largest absolute value.
        clip_parts: divides the names of all trained parameters into the parts that are clipped together; None for one.
        max_skipped_steps: how many steps in a row may be skipped for a non-finite loss or gradient.
        compile: compile the direct submodules of the method, except those that it names in `uncompiled`. The method
            itself is not compiled: its `progress` changes in each step.
        gradient_cache: whether a method that compares samples compares those of all micro-batches (`caches_gradients`).
        cuda_graphs: replay CUDA graphs of the compiled submodules. What they return, and gradients, are then valid
            until the next call of `targets`: whatever outlives a step must be a copy.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: Literal["fp32", "bf16", "fp64"] = "fp32",
        accumulation: int = 1,
        grad_clip: float | None = None,
        norm_type: float = 2.0,
        clip_parts: Callable[[list[str]], list[list[str]]] | None = None,
        max_skipped_steps: int = 0,
        gradient_cache: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        assert compile or not cuda_graphs, "CUDA graphs record compiled networks"
        self.method, self.optimizer, self.device = method, optimizer, device
        self.precision, self.accumulation = precision, accumulation
        self.caches_gradients = gradient_cache and accumulation > 1 and method.compares_samples and method.embeds
        self.grad_clip, self.norm_type = grad_clip, norm_type
        self.max_skipped_steps, self.skipped_steps = max_skipped_steps, 0
        self._pairs: dict[tuple[nn.Module, nn.Module], tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
        self.names = {parameter: name for name, parameter in method.named_parameters()}
        self._check_groups()
        trained = [self.names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self._parts = [trained] if clip_parts is None else clip_parts(trained)
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        dtype = torch.float64 if precision == "fp64" else torch.float32
        method.to(device, dtype if precision == "fp64" else None)
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._drawing = network_draws.drawing_parts(method)
        if device.type == "cpu":
            avoid_strides(method)
        if compile:
            compilation.compile_children(method, cuda_graphs)
        self.cuda_graphs = cuda_graphs
        # Without a host read, the weights need an optimizer that obeys the flag on the device. torch's fused optimizers
        # say by this name that they do; a user's own need not have it.
        obeys_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.is_late = device.type == "cuda" and max_skipped_steps == 0 and obeys_flag
        self._late: LateValue | None = None
        self._forwards, self._micro_batches = 0, 0  # forward passes since `targets`, backward passes since `step`
        self._loss = torch.zeros((), dtype=dtype, device=device)

    def targets(self, batches: list[Batch], progress: Progress) -> list[Any]:
        """`method.targets` for all micro-batches of a step, without gradient; begins the step."""
        if self.cuda_graphs:
            compilation.begin_generation()
        self.seed(progress, Phase.TARGETS)
        self._forwards = 0
        with torch.no_grad(), self._autocast():
            return self.method.targets([self._exact(batch) for batch in batches], progress)

    def forward(self, batch: Batch, progress: Progress, targets: Any) -> Loss:
        """`method.forward` for the next micro-batch of a step."""
        self.seed(progress, Phase.FORWARD)
        self._forwards += 1
        batch = self._exact(batch)
        return self._loss_of(lambda: self.method.forward(batch, progress, targets))

    def embed(self, batch: Batch, progress: Progress) -> list[Tensor]:
        """`method.embed` for the next micro-batch of a step."""
        self.seed(progress, Phase.FORWARD)
        self._forwards += 1
        batch = self._exact(batch)
        return self._run(lambda: self.method.embed(batch, progress))

    @torch.no_grad()
    def embed_all(self, batches: list[Batch], progress: Progress) -> list[Tensor]:
        """The embeddings of all micro-batches of a step, joined, without gradient. The micro-batches can then be
        embedded again, with the same random numbers."""
        parts = [self.embed(batch, progress) for batch in batches]
        self._forwards = 0
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def compare(self, embedded: list[Tensor], progress: Progress) -> Loss:
        """`method.compare` for the embeddings of a step."""
        return self._loss_of(lambda: self.method.compare(embedded, progress))

    def seed(self, progress: Progress, phase: Phase) -> None:
        """Set torch's global generators for what follows, and what the method's networks draw.

        Draws from the generators, such as those of `torch.nn.Dropout`, are then a function of the run's seed, the step,
        the rank and the micro-batch: a resumed run repeats them, and what is measured between steps does not change
        them. All ranks draw alike in `Phase.EPOCH` and `Phase.UPDATE`, where they change a state that they have in
        common. What our own networks draw depends on neither rank nor micro-batch (`network_draws`).
        """
        rank = distributed.rank() if phase in (Phase.TARGETS, Phase.FORWARD) else 0
        micro_batch = self._forwards if phase == Phase.FORWARD else 0
        seed_torch(self.device, progress.seed, progress.step, phase, rank, micro_batch)
        place = rank * self.accumulation + micro_batch
        network_draws.begin(self._drawing, progress.seed, progress.step, phase, place)

    def backward(self, value: Tensor) -> None:
        """Add the gradient of one micro-batch's loss, divided by `accumulation`."""
        assert self._micro_batches < self.accumulation, "more micro-batches than `accumulation` before a step"
        self._micro_batches += 1
        self._loss += value.detach()
        self._backward(value / self.accumulation)

    def backward_whole(self, value: Tensor, embedded: list[Tensor]) -> None:
        """Add the gradient of the loss of all micro-batches of a step. It ends at their embeddings, which are leaves;
        `backward_embedded` goes on from their `grad`."""
        self._loss += value.detach()
        self._backward(value)

    def backward_embedded(self, embedded: list[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the gradient of one micro-batch, given that of its embeddings."""
        self._micro_batches += 1
        # The gradient of this number with respect to the embeddings is `gradients`, without rounding.
        self._backward(torch.stack([(x * y).sum() for x, y in zip(embedded, gradients, strict=True)]).sum())

    def step(self, learning_rates: Sequence[float | None], weight_decays: Sequence[float] | None = None) -> StepOutcome:
        """Check, clip, update, and clear the gradients.

        Args:
            learning_rates: one for each parameter group; None leaves the group's parameters unchanged, without weight
                decay too.
            weight_decays: one for each parameter group; None for those that the groups had at first.

        Raises:
            Diverged: more than `max_skipped_steps` steps in a row were not finite. The weights are those of the last
                applied step.
        """
        assert self._micro_batches == self.accumulation, f"{self._micro_batches} micro-batches, not {self.accumulation}"
        self.check()
        decays = self._weight_decays if weight_decays is None else weight_decays
        groups = zip(self.optimizer.param_groups, learning_rates, decays, strict=True)
        for group, learning_rate, weight_decay in groups:
            is_frozen = learning_rate is None
            group |= {"lr": 0.0 if is_frozen else learning_rate, "weight_decay": 0.0 if is_frozen else weight_decay}
        norm, is_bad = self._guard()
        applied = None
        if self.is_late:
            self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            self._late = LateValue(is_bad)
        else:
            applied = not is_bad.item()
        self._apply(applied is not False)
        self._micro_batches = 0
        self._loss = torch.zeros_like(self._loss)
        if applied is not None:
            self._count(applied)
        return StepOutcome(applied, norm.to(self._loss.dtype))

    def check(self) -> None:
        """Raise Diverged if the last step was not finite; to be called before a checkpoint and at the end of a run."""
        late, self._late = self._late, None
        if late is not None:
            self._count(applied=not late.read())

    @torch.no_grad()
    def update_teachers(self, moves: Iterable[tuple[nn.Module, nn.Module, float]]) -> None:
        """(teacher, student, momentum): teacher = momentum teacher + (1 - momentum) student, parameters only."""
        for teacher, student, momentum in moves:
            self._move(*self._followed(teacher, student), momentum)

    def _followed(self, teacher: nn.Module, student: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The teacher's parameters and the student's, in one order; kept, because walking modules is slow."""
        if (teacher, student) not in self._pairs:
            source, followers = dict(student.named_parameters()), dict(teacher.named_parameters())
            assert followers.keys() <= source.keys(), f"no parameters to follow: {followers.keys() - source.keys()}"
            self._pairs[teacher, student] = list(followers.values()), [source[name] for name in followers]
        return self._pairs[teacher, student]

    @torch.no_grad()
    def rewrite(self, rewrites: Iterable[Rewrite]) -> None:
        """Set each parameter to a function of its whole value; all ranks call it with the same rewrites."""
        for parameter, function in rewrites:
            self.write_parameter(parameter, function(self._whole(parameter)))

    @abstractmethod
    def write_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter from its whole value; every rank passes the same value."""

    @torch.no_grad()
    def full_state(self, copy: Copy = to_cpu) -> dict[str, Tensor]:
        """`method.state_dict()` unsharded and copied to the CPU, on rank 0; empty on the others. All ranks call it."""
        state = {}
        for name, tensor in self.method.state_dict(keep_vars=True).items():
            whole = self._whole(tensor)
            if distributed.rank() == 0:
                state[name] = copy(whole)
        return state

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the method's parameters and buffers, unsharded."""
        return {name: self._shape(tensor) for name, tensor in self.method.state_dict(keep_vars=True).items()}

    def mismatch(self, state: Mapping[str, Tensor]) -> Mismatch:
        """How a state differs from the method's own; changes nothing."""
        own, shapes = self.method.state_dict(keep_vars=True), self.shapes()
        reshaped = [name for name in own if name in state and state[name].shape != shapes[name]]
        return Mismatch(
            missing=[name for name in own if name not in state],
            unexpected=[name for name in state if name not in own],
            reshaped=reshaped,
            recast=[n for n in own if n in state and n not in reshaped and state[n].dtype != own[n].dtype],
        )

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], strict: bool = True, converts: bool = False) -> Mismatch:
        """Set parameters and buffers from what `full_state` returned; every rank passes all of it.

        Args:
            state: tensors by name.
            strict: whether names and shapes must be the method's own; if not, those that are not are left out.
            converts: whether tensors of another dtype are converted to the method's own.

        Raises:
            UsageError: names, shapes or dtypes are not what they must be; nothing has been changed.
        """
        mismatch = self.mismatch(state)
        if (strict and not mismatch.fits) or (mismatch.recast and not converts):
            raise UsageError(f"the state does not fit the model: {mismatch}")
        own = self.method.state_dict(keep_vars=True)
        for name, tensor in own.items():
            if name in mismatch.missing or name in mismatch.reshaped:
                continue
            if isinstance(tensor, nn.Parameter):
                self.write_parameter(tensor, state[name])
            else:
                tensor.copy_(state[name])
        return mismatch

    def optimizer_state(self, copy: Copy = to_cpu) -> dict[str, Tensor]:
        """`name of parameter/name of state` -> whole tensor (0-d for counters), on the CPU of rank 0; empty elsewhere.

        Independent of the number of ranks and of how state is sharded. All ranks call it.
        """
        if distributed.rank() > 0:
            return {}
        return {
            f"{self.names[parameter]}/{key}": copy(value)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    @torch.no_grad()
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` returned; every rank passes all of it. UsageError if it does not fit.

        The state gets the memory layout of its parameter: torch's fused updates on the CPU walk parameter, gradient and
        state side by side through memory without comparing strides.
        """
        by_name = self._by_parameter(state)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    key: value.to(counter_device(group, parameter), copy=True)
                    if key == COUNTER
                    else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                    for key, value in by_name.get(self.names[parameter], {}).items()
                }

    def _by_parameter(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Optimizer state grouped by parameter; UsageError where it is not that of this model and optimizer."""
        grouped: dict[str, dict[str, Tensor]] = {}
        shapes = {name: self._shape(parameter) for parameter, name in self.names.items()}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition("/")
            if name not in shapes:
                raise UsageError(f"the optimizer state is of another model: it has {name!r}, which this model has not")
            if key != COUNTER and value.shape != shapes[name]:
                raise UsageError(
                    f"the optimizer state does not fit: {full_name} is {tuple(value.shape)} {value.dtype}, "
                    f"{name} is {tuple(shapes[name])}"
                )
            grouped.setdefault(name, {})[key] = value
        return grouped

    def _run(self, compute: Callable[[], T]) -> T:
        """What a function returns that runs networks of the method."""
        with self._autocast():
            return compute()

    def _loss_of(self, compute: Callable[[], Loss]) -> Loss:
        return self._run(compute)

    @abstractmethod
    def _backward(self, value: Tensor) -> None:
        """Add the gradients of a loss that is already divided by `accumulation`."""

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's part of the averaged gradients of a whole step, by parameter; measured and scaled in place.

        A parameter of which this rank holds nothing is left out. Parameters that the loss did not use get zeros, as in
        a flat partition: their momentum and weight decay continue.
        """
        gradients = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients[self.names[parameter]] = parameter.grad
        return gradients

    @abstractmethod
    def _apply(self, is_applied: bool) -> None:
        """Update the parameters if `is_applied`, and clear the gradients in any case."""

    def _exact(self, batch: Batch) -> Batch:
        """The batch with float64 views, if that is the precision."""
        if self.precision != "fp64":
            return batch
        return replace(batch, views=[view.double() for view in batch.views])

    def _norm_share(self) -> float:
        """Weight of this rank's gradients in the sum over ranks."""
        return 1.0

    def _shape(self, tensor: Tensor) -> torch.Size:
        return tensor.shape

    def _whole(self, tensor: Tensor) -> Tensor:
        """An unsharded parameter or buffer."""
        return tensor.detach()

    def _move(self, teachers: list[nn.Parameter], students: list[nn.Parameter], momentum: float) -> None:
        ema_update_(teachers, students, momentum)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _guard(self) -> tuple[Tensor, Tensor]:
        """(global norm before clipping, float64; whether anything on any rank is not finite); clips in place."""
        gradients, power = self._gradients(), self.norm_type
        mine = self._measured(gradients)
        rows = distributed.all_gather_rows(torch.cat([mine, self._loss.double().view(1)]).unsqueeze(0))
        shares, losses = rows[:, :-1], rows[:, -1]  # (ranks, parts), (ranks,)
        is_largest = power == math.inf
        parts = shares.amax(dim=0) if is_largest else shares.sum(dim=0)
        norm = parts.max() if is_largest else parts.sum().pow(1 / power)
        if self.grad_clip is not None:
            norms = parts if is_largest else parts.pow(1 / power)
            factors = (self.grad_clip / (norms + 1e-6)).clamp(max=1.0).to(self._loss.dtype)
            for names, factor in zip(self._parts, factors.unbind(), strict=True):
                here = [gradients[name] for name in names if name in gradients]
                if here:
                    torch._foreach_mul_(here, factor)
        return norm, ~(torch.isfinite(norm) & torch.isfinite(losses).all())

    def _measured(self, gradients: dict[str, Tensor]) -> Tensor:
        """(parts,), float64: this rank's share of each part's sum of powers; of an infinite norm, its largest value."""
        here = {name: gradient for name, gradient in gradients.items() if gradient.numel()}
        norms = torch._foreach_norm(list(here.values()), self.norm_type) if here else ()
        by_name, nothing = dict(zip(here, norms, strict=True)), torch.zeros_like(self._loss)
        values = torch.stack([by_name.get(name, nothing) for names in self._parts for name in names]).double()
        is_largest = self.norm_type == math.inf
        powers = values if is_largest else values.pow(self.norm_type)
        if len(self._parts) < len(powers):
            parts = powers.split([len(names) for names in self._parts])
            powers = torch.stack([part.max() if is_largest else part.sum() for part in parts])
        return powers if is_largest else powers * self._norm_share()

    def _count(self, applied: bool) -> None:
        self.skipped_steps = 0 if applied else self.skipped_steps + 1
        if self.skipped_steps > self.max_skipped_steps:
            times = f"{self.skipped_steps} steps in a row" if self.skipped_steps > 1 else "a step"
            raise Diverged(f"the loss or a gradient of {times} was not finite; the weights are those from before")

    def _check_groups(self) -> None:
        for group in self.optimizer.param_groups:
            assert group["params"], "a parameter group is empty"
            for parameter in group["params"]:
                assert parameter in self.names, "a parameter of the optimizer is none of the method's"
                assert parameter.requires_grad, f"{self.names[parameter]} gets no gradient but has an optimizer group"


class LocalExecutor(Executor):
    """One process, one device: nothing is sharded."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        assert distributed.world_size() == 1, "several processes need DeepSpeed"
        super().__init__(method, optimizer, **options)

    @torch.no_grad()
    def write_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)

    def _backward(self, value: Tensor) -> None:
        value.backward()

    def _apply(self, is_applied: bool) -> None:
        if is_applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def counter_device(group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Where torch's optimizers want their step counters."""
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
