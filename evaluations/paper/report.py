"""What the scripts of this folder leave: table.md for people, table.json with every number, plots."""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from autoregressive.sample.job import device_name, start_processes, versions
from autoregressive.sample.options import shown
from evaluations.paper.protocol import Task
from tokenizer.files import atomic_file, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def write_report(
    folder: Path,
    name: str,
    argv: Sequence[str] | None,
    task: Task,
    markdown: str,
    numbers: Mapping[str, Any],
    runs: Iterable[Path] = (),
    *,
    script: str | None = None,
) -> None:
    """Write table.md and table.json, and print the first.

    Args:
        folder: where.
        name: of the table or figure, as "figure5".
        argv: the script's arguments; None: the process's own.
        task: of the protocol.
        markdown: the table and what is to be said of it.
        numbers: goes into table.json.
        runs: folders of sampling runs, whose configurations go there too.
        script: of the folder scripts, without .sh; None: "reproduce_" and the name.
    """
    given = [f"{key}={shlex.quote(os.environ[key])}" for key in ("NPROC", "FLAGS") if os.environ.get(key)]
    called = ["bash", f"scripts/{script or f'reproduce_{name}'}.sh", *(sys.argv[1:] if argv is None else argv)]
    command = " ".join([*given, shlex.join(called)])
    machine = device_name(start_processes(task.cpu).device)
    text = f"`{command}` on {machine}\n\n{markdown}\n"
    configs = {}
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        configs[shown(run)] = {key: record[key] for key in ("settings", "device", "versions")}
    about = {"command": command, "machine": machine, "versions": versions()}
    write_json(folder / "table.json", about | dict(numbers) | {"runs": configs})
    with atomic_file(folder / "table.md") as file:
        file.write(text.encode())
    print(text)
    print(folder / "table.md")


def interval_told(mean: float, interval: Sequence[float], digits: int = 3) -> str:
    """'0.912 (0.905 to 0.919)'."""
    return f"{mean:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How the line of each policy is drawn, {name: matplotlib's keywords}: ADSA's stand out."""
    own = {"adsa": "black", "adsa_plus": "crimson"}
    found, others = {}, itertools.cycle(plt.get_cmap("tab20").colors)
    for name in dict.fromkeys(names):
        color, width = (own[name], 2.5) if name in own else (next(others), 1)
        found[name] = {"color": color, "linewidth": width, "marker": "o", "markersize": 4}
    return found


def save_plot(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
