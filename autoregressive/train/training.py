"""What every trainer shares: flags, step-addressed data order, schedules, EMA, checkpoints, logs and clean stops.

Exact resume rests on one rule: everything random in step s is a function of (seed, s, rank). The data order and the
augmentations are addressed by position, and torch's generators are seeded anew at each step, so that a run which was
killed and started again makes the same steps as an unbroken one.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenizer.files import atomic_file, remove_partial


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to change."""


# Those of add_training_flags that may change when a run goes on: its end, its reports, and how the work is split.
FREE_FLAGS = {
    *("results_dir", "epochs", "max_steps", "gradient_accumulation_steps", "num_workers", "compile", "no_local_save"),
    *("log_every", "eval_every", "ckpt_every", "keep_checkpoints"),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells the default of each flag that has one, unless its help does."""

    def add_argument(self, action: argparse.Action) -> None:
        told = "default" in (action.help or "")
        if not (told or action.required or action.default in (None, False, argparse.SUPPRESS)):
            action.help = f"{action.help} (default: %(default)s)" if action.help else "default: %(default)s"
        super().add_argument(action)


def add_training_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add the flags that all trainers share; `defaults` overrides their defaults by destination name."""
    add = parser.add_argument_group("training (stays as it is when a run goes on)").add_argument
    add("--global-batch-size", type=int, default=256, help="images per step over all processes")
    add("--global-seed", type=int, default=0)
    add("--lr", type=float, default=1e-4)
    add("--lr-schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up")
    add("--lr-min", type=float, default=0.0, help="where the cosine ends")
    add("--warmup-steps", type=int, default=0, help="linear, from 0")
    add("--weight-decay", type=float, default=5e-2, help="on parameters of two or more dimensions")
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.95)
    add("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
    add("--ema", action=argparse.BooleanOptionalAction, default=False, help="keep an average of the weights as well")
    add("--ema-decay", type=float, default=0.9999)
    add("--mixed-precision", choices=("none", "bf16"), default="bf16")

    add = parser.add_argument_group("course of the run (may change when it goes on)").add_argument
    add("--results-dir", type=Path, default=Path("results"), help="run folder; started again with it, the run goes on")
    add("--epochs", type=int, default=300, help="passes over the data, unless --max-steps is given")
    add("--max-steps", type=int, help="optimizer steps in all; if changed, a cosine goes on towards the new end")
    add("--gradient-accumulation-steps", type=int, default=1, help="parts each process splits its share of a step into")
    add("--num-workers", type=int, default=24, help="data loader processes per training process")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the model")
    add("--no-local-save", action="store_true", help="write logs but no checkpoints")
    add("--log-every", type=int, default=100, help="steps")
    add("--eval-every", type=int, default=5000, help="steps between validations; 0: only at the end")
    add("--ckpt-every", type=int, default=5000, help="steps; 0: only at the end")
    add("--keep-checkpoints", type=int, default=2, help="older ones are deleted; 0: keep all")
    parser.set_defaults(**defaults)


def join_processes(mixed_precision: str = "no") -> Accelerator:
    """Devices and ranks: CUDA where there is any, else the CPU, which processes only share when told so.

    Raises TrainingError if the processes that torchrun started did not find each other.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))  # one may validate while the others wait
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise TrainingError(f"torchrun started {started} processes, but only {accelerator.num_processes} work together")
    return accelerator


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, ranks and precision. Raises TrainingError if the batch does not divide evenly."""
    accelerator = join_processes("no" if args.mixed_precision == "none" else args.mixed_precision)
    parts = accelerator.num_processes * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise TrainingError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {accelerator.num_processes} processes "
            f"x {args.gradient_accumulation_steps} accumulation steps"
        )
    return accelerator


def total_steps(args: argparse.Namespace, images: int) -> int:
    """Steps of the whole run: --max-steps, or --epochs passes over `images`."""
    return args.max_steps or math.ceil(args.epochs * images / args.global_batch_size)


class StepSampler(Sampler):
    """Endless batches of (epoch, index) for one process, starting at any step.

    Position p of the stream is image permutation[epoch][p mod images] of epoch p // images, so the stream does not
    depend on the number of processes, nor on where a run was interrupted.
    """

    def __init__(self, images: int, global_batch: int, seed: int, start_step: int, rank: int = 0, world: int = 1):
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.start_step, self.rank, self.world = start_step, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        local, epoch, order = self.global_batch // self.world, -1, None
        step = self.start_step
        while True:
            first = step * self.global_batch + self.rank * local
            batch = []
            for position in range(first, first + local):
                if position // self.images != epoch:
                    epoch = position // self.images
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
                batch.append((epoch, int(order[position % self.images])))
            yield batch
            step += 1


class MappedArray:
    """A .npy file, memory-mapped when it is first read. Workers that are spawned, not forked, get its name alone."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def array(self) -> np.ndarray:
        """The array, read-only."""
        return np.load(self.path, mmap_mode="r")

    def __getitem__(self, key) -> np.ndarray:
        return self.array[key]

    def __getstate__(self) -> dict:
        return {"path": self.path}


def step_loader(
    dataset: Dataset, args: argparse.Namespace, start_step: int, accelerator: Accelerator
) -> Generator[list[Tensor]]:
    """Batches for this process from step `start_step` on; the dataset is indexed by (epoch, index).

    Close it at the end: its workers heed no signals.
    """
    sampler = StepSampler(
        len(dataset),
        args.global_batch_size,
        args.global_seed,
        start_step,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin = accelerator.device.type == "cuda"
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=args.num_workers, pin_memory=pin, worker_init_fn=_ignore_signals
    )
    with _signals_wait():  # for the workers too, until they ignore them
        batches = iter(loader)
    yield from batches


STOPS = (signal.SIGTERM, signal.SIGINT)


def _ignore_signals(worker: int) -> None:
    """A Ctrl-C, and torchrun's end, reach the workers too, which must serve the step that is being made."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What comes to stop this process comes after the block, and not at all to those that it starts."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators for one step of one process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def learning_rate(step: int, args: argparse.Namespace, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then constant or half a cosine down to --lr-min."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    progress = min(1.0, (step - args.warmup_steps) / max(1, steps - args.warmup_steps))
    return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of [..., m, n] matrices near 1, by Newton and Schulz's iteration of fifth order."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised, for matrices inside a network (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that AdamW's rate and decay serve.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update. Matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum_buffer"], group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)


class Optimizers:
    """Several optimizers of one model, in the interface of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def build_optimizer(model: nn.Module, args: argparse.Namespace, inner: Callable[[str], bool] | None = None):
    """AdamW over the trainable parameters, decaying those of two or more dimensions only.

    With --optimizer muon, the two-dimensional parameters whose name satisfies `inner` are left to Muon.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {}
    if inner is not None and args.optimizer == "muon":
        muon = {name: p for name, p in parameters.items() if p.dim() == 2 and inner(name)}
    rest = [p for name, p in parameters.items() if name not in muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    return Optimizers(adamw, Muon(muon.values(), args.lr, weight_decay=args.weight_decay)) if muon else adamw


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Ema:
    """A running average of a model's parameters, in float32; buffers are copied.

    The decay warms up as (1 + t) / (10 + t), so that short runs don't average in the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = model.state_dict()
        names = [name for name in self.weights if name in self.trainable]
        torch._foreach_lerp_([self.weights[n] for n in names], [state[n] for n in names], 1 - decay)
        for name in self.weights.keys() - self.trainable:
            self.weights[name].copy_(state[name])

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from a checkpoint's average."""
        self.updates = updates
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


class swapped_weights:
    """Within this context `model` has the given weights; afterwards its own again."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor] | None):
        self.model, self.weights = model, weights

    def __enter__(self) -> nn.Module:
        if self.weights is not None:
            self.saved = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            self.model.load_state_dict(self.weights)
        return self.model

    def __exit__(self, *exception) -> None:
        if self.weights is not None:
            self.model.load_state_dict(self.saved)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, such as of a full disk, into a TrainingError that says what to do."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} can't be written ({error.strerror or error}). Make room, or mend the permissions, and start the "
            "run again: it goes on from its newest checkpoint"
        ) from error


def save_checkpoint(folder: Path, steps: int, state: dict, keep: int) -> Path:
    """Write folder/{steps:07d}.pt atomically and delete all but the `keep` newest (0: none).

    Raises TrainingError if it can't be written; older ones are then left.
    """
    path = folder / f"{steps:07d}.pt"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, sync=True) as file:
            try:
                torch.save({**state, "steps": steps}, file)
            except RuntimeError as error:  # torch covers the error of the disk by one of its own
                raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904
        if keep:
            for old in sorted(folder.glob("[0-9]*.pt"))[:-keep]:
                old.unlink()
    return path


def load_latest_checkpoint(folder: Path) -> dict | None:
    """The newest checkpoint of a run folder, on the CPU, or None for a new run."""
    paths = sorted(folder.glob("[0-9]*.pt"))
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(
            f"{paths[-1]}: not a readable checkpoint ({error}); delete it to go on from the one before"
        ) from error


def plain_args(args: argparse.Namespace) -> dict:
    """The flags as JSON-able values, for logs and checkpoints."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


class JsonLog:
    """Appends one JSON object per line to a file and echoes it to stdout, on the main process only.

    A resumed run first drops the lines of steps that it is about to make again.
    """

    def __init__(self, path: Path, accelerator: Accelerator, start_step: int):
        self.active = accelerator.is_main_process
        self.path = path
        if not self.active:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines() if path.exists() else []
            with atomic_file(path) as file:
                file.writelines(f"{line}\n".encode() for line in lines if _logged_step(line) <= start_step)

    def write(self, **fields) -> None:
        """Log numbers, strings or lists; tensors of one element become floats."""
        if self.active:
            fields = {k: v.item() if isinstance(v, Tensor) else v for k, v in fields.items()}
            line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in fields.items()})
            with writing(self.path), open(self.path, "a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def _logged_step(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except json.JSONDecodeError:  # the line a kill cut short
        return math.inf


class StopSignal:
    """Turns SIGTERM and SIGINT into the end of a run after the step it is in, with a checkpoint."""

    def __init__(self, accelerator: Accelerator):
        self.requested, self.accelerator = False, accelerator
        self.asked = None  # step and time of the last agreement
        self.next_step = 0  # of the next one
        for number in STOPS:
            signal.signal(number, self._request)

    def _request(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, step: int) -> bool:
        """Whether to stop before step `step`.

        Several processes, whose signals come at different times, agree on it: one that stopped alone would leave the
        others waiting for its gradients. As they wait for their devices to do so, they agree about once a second.
        """
        if self.accelerator.num_processes == 1:
            return self.requested
        if step < self.next_step:
            return False
        now = time.monotonic()
        seconds = (now - self.asked[1]) / (step - self.asked[0]) if self.asked else math.inf
        self.asked = step, now
        report = torch.tensor([float(self.requested), seconds], device=self.accelerator.device)
        requested, seconds = self.accelerator.reduce(report, "sum").tolist()  # the same everywhere
        self.next_step = step + max(1, int(self.accelerator.num_processes / max(seconds, 1e-3)))
        return requested > 0


class Meter:
    """Means of scalars over the steps since the last reading, and the images/s, with no device sync in between."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.sums, self.count, self.images, self.start = {}, 0, 0, time.perf_counter()

    def add(self, images: int, **values: Tensor) -> None:
        """Count one step of `images` images."""
        self.count, self.images = self.count + 1, self.images + images
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """The means and the rate; starts a new interval."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        rate = {"images_per_s": self.images / (time.perf_counter() - self.start)}
        self.reset()
        return means | rate


def differences(there: dict, here: dict) -> list[str]:
    """What differs between two descriptions of a job, old and new, for people."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return [f"{key} was {there.get(key)} and is {here.get(key)}" for key in keys]


class TrainingRun:
    """A run folder at work: where the run goes on, its log, its checkpoints and its end.

    Make one before `accelerator.prepare`: it loads the newest checkpoint, if there is one, into `parts` and `ema`.

    Args:
        args: the flags of :func:`add_training_flags`, and others.
        accelerator: devices and ranks.
        images: in the training data.
        data: what tells the training data from others, {what: JSON value}.
        parts: {key in a checkpoint: what has a state_dict}; "model" is the model.
        ema: its average, if there is one.
        about: what else a checkpoint tells of the model; export.py needs `name` and `config`.
        free: flags of this trainer that may change when a run goes on, besides FREE_FLAGS.
        notes: more for the log's first line.

    Attributes:
        step: steps made so far.
        steps: of the whole run.
        log: the :class:`JsonLog`.

    Raises:
        TrainingError: the folder's run has other flags or data, or can't be read or written.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        images: int,
        data: dict,
        parts: dict[str, nn.Module | torch.optim.Optimizer | Optimizers],
        ema: Ema | None,
        about: dict,
        free: set[str] = frozenset(),
        notes: dict | None = None,
    ):
        self.args, self.accelerator, self.images = args, accelerator, images
        self.data, self.parts, self.ema, self.about, self.free = data, parts, ema, about, FREE_FLAGS | free
        self.folder = args.results_dir / "checkpoints"
        self.steps, self.step = total_steps(args, images), 0
        if accelerator.is_main_process:
            remove_partial(self.folder)
        checkpoint = load_latest_checkpoint(self.folder)
        if checkpoint is not None:
            self._resume(checkpoint)
        self.saved = self.step
        self.log, self.meter = JsonLog(args.results_dir / "log.jsonl", accelerator, self.step), Meter()
        start = {"processes": accelerator.num_processes, "args": plain_args(args), **(notes or {})}
        start["parameters"] = sum(p.numel() for p in parts["model"].parameters())
        self.log.write(step=self.step, start=True, steps=self.steps, images=images, **start)
        self.first_bad = torch.zeros((), dtype=torch.long, device=accelerator.device)

    def _resume(self, checkpoint: dict) -> None:
        there = self._settings(checkpoint["args"], checkpoint.get("data", {}))
        here = self._settings(plain_args(self.args), self.data)
        told = "; ".join(differences(there, {key: here.get(key, value) for key, value in there.items()}))
        if told:
            raise TrainingError(
                f"{self.args.results_dir} holds a run with other settings: {told}. Give it the same to go on, or "
                "choose another --results-dir; that may start from the weights of this one"
            )
        for key, part in self.parts.items():
            part.load_state_dict(checkpoint[key])
        if self.ema:
            self.ema.load(checkpoint["ema"], checkpoint["ema_updates"])
        self.step = checkpoint["steps"]

    def _settings(self, args: dict, data: dict) -> dict:
        """What the steps depend on, as JSON knows it."""
        flags = {"--" + name.replace("_", "-"): value for name, value in args.items() if name not in self.free}
        return json.loads(json.dumps(flags | data))

    def batches(self, dataset: Dataset) -> Generator[list[Tensor]]:
        """One batch for each step of this process, until the run's end or a signal. Each step's seed is set.

        Use it within `contextlib.closing`, so that the data loader ends with the loop however that ends.
        """
        stop = StopSignal(self.accelerator)
        self.meter.reset()
        with closing(step_loader(dataset, self.args, self.step, self.accelerator)) as loader:
            while self.step < self.steps and not stop.agreed(self.step):
                batch = next(loader)  # before seeding: the first one starts the loader, which draws a number
                seed_step(self.args.global_seed, self.step, self.accelerator.process_index)
                yield batch

    def learning_rate(self) -> float:
        """Of the step that is being made."""
        return learning_rate(self.step, self.args, self.steps)

    def count(self, values: dict[str, Tensor]) -> None:
        """Count a step that is made, of which `values` are told, and log it if that is due."""
        rate = self.learning_rate()
        self.step += 1
        self.meter.add(self.args.global_batch_size, **values)
        with torch.no_grad():
            bad = ~torch.isfinite(sum(values.values()))
            self.first_bad = torch.where(bad & (self.first_bad == 0), self.step, self.first_bad)
        if self.due(self.args.log_every):
            epoch = self.step * self.args.global_batch_size / self.images
            self.log.write(step=self.step, epoch=epoch, lr=rate, **self.meter.read())

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps is to be done now. Raises TrainingError after a NaN."""
        if self.step != self.steps and (not every or self.step % every):
            return False
        self._check()
        return True

    def _check(self) -> None:
        if bad := self.first_bad.item():
            self._fail(f"the loss or the norm of its gradient is not finite at step {bad}")

    def _fail(self, what: str) -> NoReturn:
        raise TrainingError(
            f"{what}. Older checkpoints are kept in {self.folder}: start another --results-dir from the newest, with a "
            "lower --lr, more --warmup-steps or --mixed-precision none"
        )

    def save(self) -> None:
        """Write a checkpoint, on the main process. Raises TrainingError after a NaN, or if it can't be written."""
        self._check()
        if not all(p.isfinite().all() for p in self.parts["model"].parameters()):
            self._fail(f"step {self.step} left weights that are not finite")
        self.saved = self.step
        if self.args.no_local_save or not self.accelerator.is_main_process:
            return
        state = {key: part.state_dict() for key, part in self.parts.items()}
        state |= {"args": plain_args(self.args), "data": self.data, **self.about}
        if self.ema:
            state |= {"ema": self.ema.weights, "ema_updates": self.ema.updates}
        save_checkpoint(self.folder, self.step, state, self.args.keep_checkpoints)

    def finish(self) -> None:
        """Save what isn't saved yet, and let the processes go."""
        if self.saved != self.step:
            self.save()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
