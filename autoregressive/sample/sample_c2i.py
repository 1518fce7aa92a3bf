"""Sample a few class-conditional images into one grid, and compare caches on them. See --help."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import Options, SamplingOptions, parse_options  # noqa: E402

DESCRIPTION = """\
Sample one image for each class label into a captioned grid, and say what it cost. With --compare, the same images
(same seeds, same classes) come from several caches, side by side."""
EXAMPLES = """\
examples:
  the models that ship with the project, dense against 256 of 576 tokens
    python autoregressive/sample/sample_c2i.py --config configs/demo.yaml
  other classes, by number or name, and three budgets of one policy
    python autoregressive/sample/sample_c2i.py --config configs/demo.yaml --class-labels 3 3 animal-bird animal-bird \\
        --compare full adsa-384 adsa-256 adsa-128 --output budgets.png
  LlamaGen's own demo
    python autoregressive/sample/sample_c2i.py --gpt-model GPT-L --gpt-ckpt pretrained_models/c2i_L_384.pt \\
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 384"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    defaults = Options(sampling=SamplingOptions(cfg_scale=4.0, top_k=2000))  # LlamaGen's for this script
    options = parse_options(defaults, argv, script="grid", description=DESCRIPTION, examples=EXAMPLES)
    import torch  # here, as it takes a second, which --help need not wait for

    from autoregressive.sample.grid import sample_grid, start_grid
    from autoregressive.sample.labels import Classes, require_classes
    from autoregressive.sample.sampler import Blueprint

    require_classes(options)
    variants, state = start_grid(options)
    blueprint = Blueprint(options.model, state.device)
    classes = Classes(options.model, options.run)
    given = options.run.grid_labels
    labels = classes.few() if given is None else classes.ids(given, "run.grid_labels")
    captions = [classes.names[label] for label in labels]
    sample_grid(variants, blueprint, state.device, captions, torch.tensor(labels))


if __name__ == "__main__":
    guarded(main)
