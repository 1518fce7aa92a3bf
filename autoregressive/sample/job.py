"""A sampling job: any number of processes fill one run folder, batch by batch.

Batch b is always the images b * n to (b + 1) * n - 1, whoever samples it and however often the job was interrupted,
so that even arithmetic which depends on the batch gives the same images. The processes share the batches not yet whole.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from autoregressive.models.schedule import Schedule
from autoregressive.sample.options import ROOT, CacheOptions, OptionError, Options
from autoregressive.sample.run_folder import RunError, RunFolder, bar_interval
from autoregressive.sample.sampler import Blueprint, Sampler, forget_peak_memory, peak_memory


def start_processes(cpu: bool = False) -> PartialState:
    """Join the other processes, if torchrun started any, and choose a device.

    Args:
        cpu: use the CPU even where there is a GPU.

    Raises:
        OptionError: more processes on this machine than GPUs.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cpu or not torch.cuda.is_available():
        cpu = True
        if local > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or accelerate sets its own
    elif local > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise OptionError(f"{local} processes on a machine with {gpus} GPUs: start one for each GPU, or give --cpu")
    # cuDNN's attention plans anew for each length, which takes seconds, and a cache grows token by token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Processes meet at the start and at the end, and one may have much more to do than another.
    return PartialState(cpu=cpu, timeout=timedelta(days=30))


def run_job(
    state: PartialState,
    folder: RunFolder,
    batch_size: int,
    *,
    settings: Mapping[str, Any],
    details: Mapping[str, Any],
    files: Mapping[str, bytes],
    seeds: np.ndarray,
    load: Callable[[], Sampler],
    conditions: Callable[[Sequence[int]], tuple[Tensor, Tensor | None]],
    encode: Callable[[Sequence[int]], None] | None = None,
) -> dict[str, Any]:
    """Sample the images that the folder lacks. Called by all processes alike.

    Args:
        state: from :func:`start_processes`.
        folder: where; opened here.
        batch_size: images that a process samples at a time.
        settings, details, files: see :meth:`RunFolder.open`.
        seeds: int64 [total].
        load: builds the models; called only if there is something to sample.
        conditions: image indices -> (cond, masks), as :meth:`Sampler.tokens` takes them.
        encode: called before `load` with the images that this process will sample: text becomes features then.

    Returns:
        On the main process what run.json now says; elsewhere nothing.

    Raises:
        RunError: see :class:`RunFolder`; also if another process failed.
    """
    with closing(folder):
        missing = set(_opened(state, folder, settings, details | _session(state, batch_size), files))
        bounds = [(start, min(start + batch_size, folder.total)) for start in range(0, folder.total, batch_size)]
        batches = [range(*bound) for bound in bounds if not missing.isdisjoint(range(*bound))]
        if batches:
            with _Progress(folder, show=state.is_main_process):
                mine = batches[state.process_index :: state.num_processes]
                report = _sample(state, folder, mine, seeds, load, conditions, encode)
                reports = _meet(lambda: gather_object([report]))
            if state.is_main_process:
                folder.note(status="sampled", **_summary(reports))
        if state.is_main_process and (batches or not folder.npz.exists() or folder.record["status"] != "complete"):
            start = time.perf_counter()
            folder.write_npz()
            folder.note(status="complete", npz_seconds=round(time.perf_counter() - start, 3))
    return folder.record


def _opened(state: PartialState, folder: RunFolder, settings, details, files) -> list[int]:
    """The missing images, which the main process finds out for all, or its error, which ends all."""
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = folder.open(settings, details, files)
        except RunError as error:
            answer[1] = str(error)
    answer = _meet(lambda: broadcast_object_list(answer))
    if answer[1] is not None:
        raise RunError(answer[1]) if state.is_main_process else SystemExit(1)
    return answer[0]


def _sample(
    state: PartialState, folder: RunFolder, batches: Sequence[range], seeds, load, conditions, encode
) -> dict[str, Any]:
    """This process's batches, and what they cost."""
    report: dict[str, Any] = {"images": 0, "cache": {}, "device": device_name(state.device)}
    seconds = {"load": 0.0, "gpt": 0.0, "vq": 0.0, "io": 0.0}
    if encode is not None:
        start = time.perf_counter()
        if batches:
            encode([index for batch in batches for index in batch])
        seconds["encode"] = time.perf_counter() - start
        forget_peak_memory(state.device)  # what is reported is the memory of sampling
    start = time.perf_counter()
    sampler = load() if batches else None
    seconds["load"] = time.perf_counter() - start
    start = time.perf_counter()
    for batch in batches:
        cond, masks = conditions(batch)
        tokens = sampler.tokens(cond, torch.from_numpy(seeds[batch.start : batch.stop]), masks)
        images = sampler.images(tokens, folder.image_size)
        written = time.perf_counter()
        kept = tokens.cpu().numpy().astype(np.min_scalar_type(sampler.vq.config.codebook_size - 1))
        folder.write_images(batch, images, kept)
        seconds["io"] += time.perf_counter() - written
        report["images"] += len(batch)
    report["wall_seconds"] = round(time.perf_counter() - start, 3)
    if sampler is not None:
        seconds |= sampler.seconds
        report["cache"] = sampler.cache_report
    report["seconds"] = {phase: round(value, 3) for phase, value in seconds.items()}
    return report | {"peak_memory_bytes": peak_memory(state.device)}


def _summary(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One process's view is not the run's: images are added up, and the slowest process sets the time."""
    images = sum(report["images"] for report in reports)
    wall = max(report["wall_seconds"] for report in reports)
    cache = max((report["cache"] for report in reports), key=lambda cache: cache.get("images_per_batch", 0))
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "images": images,
        "wall_seconds": wall,
        "images_per_second": round(images / wall, 4),
        "seconds": {phase: max(r["seconds"][phase] for r in reports) for phase in reports[0]["seconds"]},
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
        "cache": cache,
        "processes": list(reports),
    }


class _Progress(threading.Thread):
    """A progress bar over the images of all processes, counted in the folder while the with-block runs."""

    def __init__(self, folder: RunFolder, show: bool):
        super().__init__(daemon=True)
        self.folder, self.show, self.done = folder, show, threading.Event()

    def __enter__(self):
        if self.show:
            self.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        if self.show:
            self.join()

    def run(self) -> None:
        count = self.folder.count()
        with tqdm(
            total=self.folder.total, initial=count, unit=" images", smoothing=0, mininterval=bar_interval()
        ) as bar:
            while not self.done.wait(bar_interval()):
                bar.update(self.folder.count() - bar.n)
            bar.update(self.folder.count() - bar.n)


def _meet(talk: Callable[[], Any]) -> Any:
    try:
        return talk()
    except RuntimeError as error:  # the connection broke
        raise RunError(f"another process has stopped, see its message ({str(error).splitlines()[0]})") from error


def _session(state: PartialState, batch_size: int) -> dict[str, Any]:
    """What run.json says about this start of the job."""
    return {
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "world_size": state.num_processes,
        "per_proc_batch_size": batch_size,
        "device": device_name(state.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of the things that results depend on; the project's own is its git commit, where there is one."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "project": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
    }


# What may change between an interrupted run and the next start, since the images don't depend on it; prompts and the
# encoder are told by their content.
_FREE = {
    "model.from_fsdp",
    "run.class_names",
    "run.columns",
    "run.compare",
    "run.cpu",
    "run.grid_labels",
    "run.output",
    "run.per_proc_batch_size",
    "run.sample_dir",
    "text.clean",
    "text.encoder",
    "text.encoder_path",
    "text.feature_dir",
    "text.keep_encoder",
    "text.max_length",
    "text.precision",
    "text.prompt_file",
    "text.prompts",
}


def run_settings(options: Options, blueprint: Blueprint, device: torch.device) -> dict[str, Any]:
    """All that the images depend on, {dotted name: value}; checkpoints by what is in them, not by where they lie."""
    sections = options.values()
    cache, sampling = options.cache_config(), options.sampling
    try:
        order = Schedule(blueprint.tokens, blueprint.grid, sampling.zipar_window).order
    except ValueError as error:
        raise OptionError(str(error)) from error
    if order is not None:
        cache = cache.fitted(order)
    prefix, local = cache.split  # as they are, and not None for the policy's own
    sections["cache"] |= {"prefix": prefix, "local": local, "renew_every": cache.renewal, "merge": cache.merges or None}
    sections["cache"]["revision"] = cache.rule.revision
    # As in runs that are older than these.
    sections["sampling"]["zipar_adaptive"] = sampling.zipar_adaptive or None
    sections["model"]["cuda_graphs"] = options.model.cuda_graphs or None
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    free = _FREE - {"run.per_proc_batch_size"} if sampling.zipar_adaptive else _FREE
    kept = {key: value for key, value in flat.items() if key not in free}
    return kept | blueprint.fingerprints() | {"device": device.type}


def run_name(options: Options, prompts: str | None = None) -> str:
    """LlamaGen's name of the run folder, with the cache behind it unless that is the plain dense one.

    Args:
        prompts: what a text-conditional run calls its prompts.
    """
    model, sampling, run = options.model, options.sampling, options.run
    zipar = f"zipar-{sampling.zipar_window}-{'adaptive-' * sampling.zipar_adaptive}" if sampling.zipar_window else ""
    checkpoint = Path(model.gpt_ckpt)
    if model.from_fsdp and checkpoint.stem == "consolidated":
        checkpoint = checkpoint.parent
    name = (
        f"{model.gpt_model.replace('/', '-')}-{checkpoint.stem}-{f'{prompts}-' if prompts else ''}"
        f"size-{model.image_size}-size-{run.image_size_eval}-"
        f"{model.vq_model}-topk-{sampling.top_k}-topp-{sampling.top_p}-temperature-{sampling.temperature}-"
        f"cfg-{sampling.cfg_scale}-{zipar}{f'{model.quantize}-' if model.quantize else ''}seed-{run.seed}"
    )
    cache, plain = asdict(options.cache), asdict(CacheOptions())
    told = [
        f"-{key}-{value}" for key, value in cache.items() if value != plain[key] and key not in ("policy", "budget")
    ]
    if cache["policy"] != "full":
        told.insert(0, f"-{cache['policy']}-{cache['budget']}")
    return name + "".join(told)


def told(folder: RunFolder, record: Mapping[str, Any]) -> str:
    """What a finished job says of itself."""
    lines = [f"{folder.total} images in {folder.path}"]
    if "images_per_second" in record:
        cache = record["cache"]
        lines.append(
            f"{record['images_per_second']} images/s; cache of {cache['slots']} slots, "
            f"{cache['kv_bytes'] / 2**20:.1f} MiB for {cache['images_per_batch']} images"
        )
    return "\n".join([*lines, str(folder.npz)])
