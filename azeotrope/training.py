"""`fit`: one training loop for heads and for students.

Losses return a sum and a count. Gradients are summed over all micro-batches of a step and over all
ranks, then divided by the total count. So 4 micro-batches of 1 equal 1 batch of 4, and two ranks
equal one. The order of samples depends only on the seed and the step, so a run that was killed and
resumed ends with the same weights as an uninterrupted one.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from azeotrope.config import Config
from azeotrope.files import written_whole

Item = TypeVar("Item")
STATE = "state.safetensors"


class TokenSum(NamedTuple):
    """A loss summed over tokens, and how many tokens are in it.

    `parts` are numbers to plot beside the loss, such as its terms. They have no gradient.
    """

    total: Float[Tensor, ""]
    count: int
    parts: Mapping[str, float] = MappingProxyType({})


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient is not a number; the message names the step and the samples."""


class FitConfig(Config):
    """Optimisation settings. The defaults suit the pocket students."""

    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_size: int = Field(default=16, ge=1, description="samples per step, over all ranks")
    accumulation: int = Field(default=1, ge=1, description="micro-batches per step, on each rank")
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps with a rising rate"
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0, description="greatest norm of the gradient")
    seed: int = 0

    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "FitConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulation} "
                "micro-batches (accumulation); take a multiple"
            )
        return self


@dataclass(frozen=True)
class LogEntry:
    """The numbers of one step to plot; `loss` is in nats per token.

    `parts` are means over the step's micro-batches, as the first rank saw them.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class FitResult:
    steps: int
    tokens: int
    seconds: float
    log: list[LogEntry] = field(default_factory=list)


class _Progress(NamedTuple):
    step: int
    tokens: int
    seconds: float
    log: list[LogEntry]


def fit(
    parameters: Sequence[nn.Parameter],
    data: Sequence[Item],
    loss: Callable[[list[Item]], TokenSum],
    config: FitConfig,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[LogEntry], None] | None = None,
    identify: Callable[[Item], str] = str,
) -> FitResult:
    """Minimise the mean loss per token with AdamW.

    Args:
        parameters: they are trained in place.
        data: samples by index, repeated in a new order every epoch.
        loss: a differentiable sum over the tokens of some samples. If a graph of the whole would be
            too large, it may call `backward` itself on parts and return a detached total.
        checkpoint: a folder for the state: it is resumed from there, and saved there.
        on_step: called every `log_every` steps.
        identify: the name of a sample, for errors.

    Raises:
        ValueError: if there is no data, the batch does not divide over ranks and accumulation, or
            the saved state belongs to another model.
        NonFiniteLossError: at the first loss or gradient that is not finite; nothing is saved.
    """
    world, rank = _world()
    _check_sizes(len(data), config, world)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    done = _resume(parameters, optimizer, checkpoint)
    result = FitResult(done.step, done.tokens, done.seconds, list(done.log))
    started = time.perf_counter() - done.seconds
    batches = sample_order(len(data), config.batch_size, config.seed)
    parts = world * config.accumulation
    for step in range(config.steps):
        chosen = next(batches)
        if step < done.step:
            continue
        # Dropout, if there is any, draws the same numbers in a resumed run.
        torch.manual_seed(config.seed * 1_000_003 + step)
        micro = ([data[i] for i in chosen[part::parts]] for part in range(rank, parts, world))
        summed = _add_gradients(micro, loss, step, identify)
        total, count = _sum_over_ranks(parameters, summed.total, summed.count, world)
        norm = _normalise(parameters, count, config.clip, step)
        rate = _update(optimizer, config, step)
        result.steps, result.tokens = step + 1, result.tokens + count
        last = result.steps == config.steps
        if result.steps % config.log_every == 0 or last:
            mean = float(total) / max(count, 1)
            result.log.append(LogEntry(result.steps, mean, rate, norm, dict(summed.parts)))
            if on_step is not None:
                on_step(result.log[-1])
        if checkpoint is not None and (result.steps % config.checkpoint_every == 0 or last):
            result.seconds = time.perf_counter() - started
            if rank == 0:
                _save(parameters, optimizer, checkpoint, result)
    result.seconds = time.perf_counter() - started
    return result


def _check_sizes(samples: int, config: FitConfig, world: int) -> None:
    if samples == 0:
        raise ValueError("there is nothing to train on: the data set is empty")
    if config.batch_size % (world * config.accumulation):
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of accumulation x ranks = "
            f"{config.accumulation} x {world}"
        )


def _add_gradients(
    micro_batches: Iterable[list[Item]],
    loss: Callable[[list[Item]], TokenSum],
    step: int,
    identify: Callable[[Item], str],
) -> TokenSum:
    """Add the gradients of this rank's micro-batches; the sum of their losses, parts averaged."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    parts: list[Mapping[str, float]] = []
    for samples in micro_batches:
        part_sum = loss(samples)
        if not torch.isfinite(part_sum.total):
            names = ", ".join(identify(sample) for sample in samples)
            raise NonFiniteLossError(
                f"the loss is {part_sum.total.item()} at step {step} on samples {names}; "
                "lower the learning rate or the strength"
            )
        if part_sum.total.requires_grad:
            part_sum.total.backward()
        total += part_sum.total.detach().double().cpu()
        count += part_sum.count
        parts.append(part_sum.parts)
    return TokenSum(total, count, _means(parts))


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each named number over the micro-batches that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _update(optimizer: torch.optim.Optimizer, config: FitConfig, step: int) -> float:
    """One optimizer step at this step's learning rate, which is returned."""
    rate = config.learning_rate * rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate


def sample_order(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: a new permutation each epoch; a batch may span two epochs."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting.extend(torch.randperm(size, generator=generator).tolist())
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def rate_at(step: int, config: FitConfig) -> float:
    """The factor on the learning rate: a linear rise, then the schedule down to 0."""
    warm = max(round(config.warmup * config.steps), 0)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    share = (step - warm) / max(config.steps - warm, 1)
    return 1.0 - share if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))


def _normalise(parameters: Sequence[nn.Parameter], count: int, clip: float, step: int) -> float:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(count, 1))
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if not math.isfinite(norm):
        raise NonFiniteLossError(f"the gradient is {norm} at step {step}; lower the learning rate")
    return norm


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def _sum_over_ranks(
    parameters: Sequence[nn.Parameter], total: Tensor, count: int, world: int
) -> tuple[Tensor, int]:
    if world == 1:
        return total, count
    for parameter in parameters:
        # Every rank must join every reduction, or the others wait for ever: one without tokens too.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
    pair = torch.tensor([float(total), float(count)], device=parameters[0].device)
    torch.distributed.all_reduce(pair)
    return pair[0].cpu(), int(pair[1])


def _save(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    result: FitResult,
) -> None:
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        tensors[f"parameter.{index}"] = parameter.detach().contiguous()
        for name, value in optimizer.state[parameter].items():
            tensors[f"{name}.{index}"] = torch.as_tensor(value).contiguous()
    described = {
        "step": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "log": [asdict(entry) for entry in result.log],
    }
    # One file and one rename, so weights, optimizer state and step always belong together.
    with written_whole(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"fit": json.dumps(described)})


def _resume(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path | None
) -> _Progress:
    """Restore weights and optimizer from a saved state, if there is one."""
    if folder is None or not (folder / STATE).is_file():
        return _Progress(0, 0, 0.0, [])
    with safe_open(folder / STATE, framework="pt") as file:
        described = json.loads(file.metadata()["fit"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for index, parameter in enumerate(parameters):
        saved = tensors.pop(f"parameter.{index}")
        if saved.shape != parameter.shape:
            raise ValueError(
                f"the state in {folder} has a parameter of shape {tuple(saved.shape)} where the "
                f"model has {tuple(parameter.shape)}; it belongs to another model"
            )
        parameter.data.copy_(saved)
    for key, value in tensors.items():
        name, _, index = key.rpartition(".")
        parameter = parameters[int(index)]
        # AdamW keeps its step count on the CPU, whatever the device of the moments.
        moved = value if name == "step" else value.to(parameter.device)
        optimizer.state[parameter][name] = moved
    log = [LogEntry(**entry) for entry in described["log"]]
    return _Progress(described["step"], described["tokens"], described["seconds"], log)
