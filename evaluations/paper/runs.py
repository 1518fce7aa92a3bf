"""Makes sure that a sampling run or an evaluation is there, and returns it: what is done is not done again.

Sampling and evaluating are processes of their own, as from a shell; with NPROC in the environment, so many by torchrun.
Their progress bars are seen as usual.
"""

import functools
import glob
import importlib
import json
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adsa import CacheConfig
from autoregressive.sample import decode_tokens
from autoregressive.sample.job import start_processes
from autoregressive.sample.labels import Classes
from autoregressive.sample.options import ROOT, shown
from autoregressive.sample.sampler import Blueprint
from evaluations.clip import clip_title, load_clip
from evaluations.extractors import EvaluationError, folder_state, load_extractor
from evaluations.features import Features, FolderImages, ImageSet, Statistics, extract, open_set
from evaluations.paper.protocol import ClassTask, Task, TextTask
from evaluations.table import find_result, write_result


def sampled(
    task: Task,
    cache: Mapping[str, Any] | None = None,
    seed: int = 0,
    images: int | None = None,
    *,
    judged: bool = False,
) -> Path:
    """The folder of a complete sampling run, which is made or finished first if need be.

    Args:
        task: of a protocol.
        cache: keys of CacheConfig and their values; None: the dense cache.
        seed: of the run; equal seeds make the same noise for every cache.
        images: how many; None: the task's own number.
        judged: :func:`evaluated` or :func:`scored` is to follow; what they need is looked for before hours of sampling.

    Raises:
        EvaluationError: sampling failed, and has told why; or what judges the images is missing.
        OptionError, RunError, CheckpointError, TextEncoderError: nothing can be sampled like this.
    """
    script, argv, job = _planned(task, cache, seed, images)
    if not job["folder"].is_complete(job["settings"]):
        if judged:
            _look_for_judge(task)
        launch(Path(script.__file__), argv)
    return job["folder"].path


def again(
    task: Task, caches: Sequence[Mapping[str, Any] | None], seed: int, images: int, indices: Sequence[int]
) -> list[np.ndarray]:
    """Some images of runs, sampled here whether or not the runs are there: uint8 [N, H, W, 3] for each cache.

    Args:
        task, seed, images: as :func:`sampled` takes them.
        caches: of the runs.
        indices: which images of each. Sampled at once, apart from others, they may differ from those of a run where
            rounding tips a draw.

    Raises:
        OptionError, CheckpointError, TextEncoderError: they can't be sampled.
    """
    job = _planned(task, None, seed, images)[2]
    if isinstance(task, TextTask):
        job["conditions"].encode(indices)
    conditions, masks = zip(*(job["conditions"](range(index, index + 1)) for index in indices), strict=True)
    masks = None if masks[0] is None else torch.cat(masks)
    sampler, found = job["load"](), []
    for cache in caches:
        sampler.cache = CacheConfig.from_dict(cache or {"policy": "full"})
        tokens = sampler.tokens(torch.cat(conditions), torch.from_numpy(job["seeds"][list(indices)]), masks)
        found.append(sampler.images(tokens, job["folder"].image_size))
    return found


def identity_of(task: Task, cache: Mapping[str, Any] | None, seed: int, images: int) -> dict[str, Any]:
    """All that the images of a run and what is said of them depend on; nothing is sampled. JSON-able.

    Raises:
        EvaluationError, OptionError, CheckpointError: as :func:`sampled`.
    """
    settings = _planned(task, cache, seed, images)[2]["settings"]
    if isinstance(task, TextTask):
        judge = {"clip": clip_title(task.clip_model, task.clip_pretrained), "prefix": task.clip_prefix}
        judge["clip_files"] = folder_state(task.clip_model)
    else:
        theirs, statistics = reference_set(task)
        judge = {"extractor": task.feature_extractor, "reference": (theirs or statistics).identity}
    return json.loads(json.dumps(settings | judge | {"images": images}))


def _planned(
    task: Task, cache: Mapping[str, Any] | None, seed: int, images: int | None
) -> tuple[types.ModuleType, list[str], dict[str, Any]]:
    """The sampling script of a run, its flags, and what it makes of them."""
    images = task.images if images is None else images
    argv = ["--config", str(task.config), *task.flags, *cache_flags(cache), "--seed", str(seed)]
    argv += ["--num-fid-samples", str(images), "--sample-dir", str(task.sample_dir / f"{images}_images")]
    if isinstance(task, TextTask):
        argv += ["--prompts", str(task.prompts)]
    script = importlib.import_module(f"autoregressive.sample.{task.script}")
    return script, argv, script.job(argv)


@functools.cache
def _look_for_judge(task: Task) -> None:
    """Raises what evaluating the task's images would raise later."""
    if isinstance(task, TextTask):
        load_clip(task.clip_model, task.clip_pretrained)
    else:
        reference_set(task)
        load_extractor(task.feature_extractor)


def resized(run: Path, task: Task) -> Path:
    """The folder of a run's images scaled down antialiased, by decode_tokens.py from the tokens that it keeps.

    Raises:
        EvaluationError: it failed, and has told why.
    """
    argv = [str(run), "--antialias", *(["--cpu"] if task.cpu else [])]
    job = decode_tokens.job(argv)
    if not job["folder"].is_complete(job["settings"]):
        launch(Path(decode_tokens.__file__), argv)
    return job["folder"].path


def cache_flags(cache: Mapping[str, Any] | None) -> list[str]:
    """The flags of a cache, for the sampling scripts."""
    flags = []
    for key, value in (cache or {"policy": "full"}).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--cache-{name}" if value else f"--no-cache-{name}")
        else:
            flags += [f"--cache-{name}", str(value)]
    return flags


def evaluated(samples: Path, task: ClassTask) -> dict[str, Any]:
    """What fid.py says of a run, or of a folder of images, against the task's reference; kept in its metrics.json.

    Raises:
        EvaluationError: it failed, and has told why; or there is no such set.
    """
    ours, _, _ = open_set(samples, task.feature_extractor)
    theirs, statistics = reference_set(task)
    wanted = {
        "extractor": task.feature_extractor,
        "image_size": None,
        "samples_id": ours.identity,
        "reference_id": (theirs or statistics).identity,
    }
    found = find_result(samples, "fid", wanted)
    if found is None:
        chosen = ["--reference-classes", *theirs.classes] if getattr(theirs, "classes", None) else []
        flags = [str(samples), str(task.reference), "--feature-extractor", task.feature_extractor, *chosen]
        found = json.loads(launch(ROOT / "evaluations" / "fid.py", flags))
        write_result(samples, found)
    return found


def scored(run: Path, task: TextTask) -> dict[str, Any]:
    """What clip_score.py says of a run; the scores of its images are in RUN / result["scores"].

    Raises:
        EvaluationError: it failed, and has told why.
    """
    wanted = {
        "clip_model": clip_title(task.clip_model, task.clip_pretrained),
        "clip_files": folder_state(task.clip_model),
        "prefix": task.clip_prefix,
        "samples_id": open_set(run, "")[0].identity,
    }
    found = find_result(run, "clip_score", wanted)
    if found is None or not (run / found["scores"]).exists():
        flags = [str(run), "--clip-model", task.clip_model, "--prefix", task.clip_prefix]
        flags += [] if task.clip_pretrained is None else ["--pretrained", task.clip_pretrained]
        found = json.loads(launch(ROOT / "evaluations" / "clip_score.py", flags))
    return found


def features_of(images: ImageSet | Features, task: ClassTask) -> Features:
    """The task's features of a set of images, as :func:`open_set` finds one; from the file beside it, where it is."""
    if isinstance(images, Features):
        return images
    state = start_processes(task.cpu)
    name = task.feature_extractor
    return extract(images, name, lambda: load_extractor(name), state, batch_size=64, workers=0)


def class_names(task: ClassTask) -> list[str]:
    """Of the model's classes, one each."""
    options = task.options()
    Blueprint(options.model, torch.device("cpu"))  # tells the number of classes
    return Classes(options.model, options.run).names


def class_patterns(task: ClassTask) -> list[str] | None:
    """Patterns for the folders of the reference's images that count; None: all of them."""
    found = []
    for pattern in task.reference_classes:
        names = [glob.escape(name) for name in class_names(task)] if "{class}" in pattern else [""]
        found += [pattern.replace("{class}", name) for name in names]
    return found or None


def reference_set(task: ClassTask) -> tuple[ImageSet | Features | None, Statistics | None]:
    """The task's reference: images or their features, and statistics, see :func:`open_set`.

    Raises:
        EvaluationError: it is not there, or can't be used.
    """
    if task.reference_images and ".features-" in task.reference.name and not task.reference.exists():
        raise EvaluationError(
            f"{task.reference}: no such file (c2i.reference); `python evaluations/paper/reference.py --model NAME` "
            f"makes it from the images in {task.reference_images} (c2i.reference_images)"
        )
    classes = class_patterns(task) if task.reference.is_dir() else None
    images, statistics, _ = open_set(task.reference, task.feature_extractor, classes=classes)
    return images, statistics


def reference_images(task: ClassTask) -> FolderImages:
    """The reference as images, for what needs more than their features.

    Raises:
        EvaluationError: the protocol names no folder of them, or it is not there.
    """
    folder = task.reference_images or task.reference
    if not folder.is_dir():
        raise EvaluationError(f"{shown(folder)}: no folder of the reference's images (c2i.reference_images)")
    return FolderImages(folder, class_patterns(task))


def launch(script: Path, argv: Sequence[str]) -> str:
    """Run a script to its end, by NPROC processes, with its messages and progress on stderr.

    Returns:
        What it printed on stdout.

    Raises:
        EvaluationError: it ended with an error.
    """
    processes = os.environ.get("NPROC", "1")
    command = [sys.executable]
    if processes != "1":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    told = shlex.join([shown(script), *argv])
    print(f"-- {told}", file=sys.stderr)
    done = subprocess.run([*command, str(script), *argv], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise EvaluationError(f"this has failed, see its message above: {told}")
    return done.stdout
