"""Flags that the scripts of this folder share."""

import argparse
import os


def positive(text: str) -> int:
    """A whole number above 0, as a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the work is done; results depend on none of them."""

    def count(text: str) -> int:
        value = int(text)
        if value < 0:
            raise argparse.ArgumentTypeError(f"{text} is negative")
        return value

    add = parser.add_argument
    add("--batch-size", type=positive, default=64, metavar="N", help="images at a time for each process (default: 64)")
    add(
        "--num-workers",
        type=count,
        default=min(4, _cores()),
        metavar="N",
        help="processes that read images for each (default: up to 4)",
    )
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")


def add_clip_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a CLIP, for :func:`evaluations.clip.load_clip`."""
    add = parser.add_argument
    add(
        "--clip-model",
        default="ViT-B-32",
        metavar="NAME",
        help="open_clip's name of a model, local-dir:FOLDER or hf-hub:REPOSITORY (default: %(default)s). Numbers of "
        "different models do not compare",
    )
    add("--pretrained", metavar="TAG|FILE", help="weights of a model that has a name (default: openai)")


def _cores() -> int:
    """The processor's cores for each process on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
