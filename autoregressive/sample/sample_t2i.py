"""Sample a few images from prompts into one grid, and compare caches on them. See --help."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import Options, parse_options  # noqa: E402

DESCRIPTION = """\
Sample one image for each prompt into a captioned grid, and say what it cost. With --compare, the same images (same
seeds, same prompts) come from several caches, side by side."""
EXAMPLES = """\
examples:
  the models that ship with the project: dense against 768, 640 and 512 of 1024 tokens
    python autoregressive/sample/sample_t2i.py --config configs/demo_t2i.yaml
  your prompts, by one cache; from a file or a pipe by --prompts FILE and --prompts -
    python autoregressive/sample/sample_t2i.py --config configs/demo_t2i.yaml --cache-budget 512 \\
        --prompt "twemoji: red apple" --prompt "a green apple in noto style"
  LlamaGen's released models with the paper's ADSA-512
    python autoregressive/sample/sample_t2i.py --config configs/t2i_XL_stage2_512_adsa512.yaml --output car.png \\
        --prompt "A blue Porsche 356 parked in front of a yellow brick wall." --compare full adsa-512"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    options = parse_options(Options.text_to_image(), argv, script="grid", description=DESCRIPTION, examples=EXAMPLES)
    # Here, as torch comes with it, which takes a second, and --help need not wait for that.
    from autoregressive.sample.grid import sample_grid, start_grid
    from autoregressive.sample.prompts import read_prompts, require_text, tell
    from autoregressive.sample.sampler import Blueprint
    from autoregressive.sample.text import TextConditions, told_left_out

    require_text(options)
    prompts = read_prompts(options.text)
    variants, state = start_grid(options)
    blueprint = Blueprint(options.model, state.device)
    conditions = TextConditions(options, prompts, state.device)
    everything = range(len(prompts.texts))
    tell(prompts.notes() + told_left_out(conditions.left_out()))
    conditions.encode(everything)
    features, masks = conditions(everything)
    sample_grid(variants, blueprint, state.device, prompts.texts, features, masks)


if __name__ == "__main__":
    guarded(main)
