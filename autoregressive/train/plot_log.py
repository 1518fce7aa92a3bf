"""Draw the curves of training runs from their log.jsonl.

python autoregressive/train/plot_log.py --out curves.png runs/stage1 runs/stage2
python autoregressive/train/plot_log.py --out curves.png --fields rec val_psnr usage -- runs/vq_demo
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_log(run: Path) -> list[dict]:
    """The lines of a run's log. Raises FileNotFoundError, naming it, if there is none."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--fields", nargs="+", default=["loss", "val_loss"], help="logged values; one panel for each")
    args = parser.parse_args(argv)
    try:
        logs = {run: read_log(run) for run in args.runs}
    except FileNotFoundError as error:
        sys.exit(f"plot_log: {error.filename}: no such log; give run folders of vq_train.py or train_c2i.py")
    figure, panels = plt.subplots(1, len(args.fields), figsize=(4.5 * len(args.fields), 3.2), squeeze=False)
    for panel, field in zip(panels[0], args.fields, strict=True):
        for run, lines in logs.items():
            points = [(line["step"], line[field]) for line in lines if field in line]
            if points:
                panel.plot(*zip(*points, strict=True), label=run.name)
        panel.set(xlabel="step", title=field)
        panel.grid(alpha=0.3)
    if len(logs) > 1:
        panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
