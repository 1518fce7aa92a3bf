"""Sample an image for each of many prompts with any number of processes, for FID and CLIP scores. See --help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import OptionError, Options, parse_options  # noqa: E402

DESCRIPTION = """\
Fill a run folder with an image for each prompt: PNGs, tokens, captions.txt, result.jsonl, samples.npz (arr_0, uint8
NHWC) and run.json.

Image i depends on the seed, its index and its prompt alone, not on the number of processes or the batch size. Killed at
any moment and started again with the same command, the job goes on where it was."""
EXAMPLES = """\
examples:
  one process, on whatever device there is; the prompts and models that ship with the project
    python autoregressive/sample/sample_t2i_ddp.py --config configs/demo_t2i.yaml
  eight GPUs, the paper's Table 2 with 512 of 1024 tokens cached; scripts/coco_prompts.py makes the prompts
    torchrun --standalone --nproc-per-node 8 autoregressive/sample/sample_t2i_ddp.py \\
        --config configs/t2i_XL_stage2_512_adsa512.yaml --prompts data/coco/coco_val2014.tsv
  the same by flags alone, as in LlamaGen
    torchrun --standalone --nproc-per-node 8 autoregressive/sample/sample_t2i_ddp.py \\
        --prompt-csv coco_captions.csv --gpt-ckpt pretrained_models/t2i_XL_stage2_512.pt \\
        --vq-ckpt pretrained_models/vq_ds16_t2i.pt --t5-path pretrained_models/t5-ckpt \\
        --image-size 512 --cfg-scale 7.5 --top-k 1000 --cache-policy adsa --cache-budget 512"""


def job(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What :func:`run_job` is to be called with, for these arguments; no model is read yet. None: the process's own."""
    options = parse_options(Options.text_to_image(), argv, script="job", description=DESCRIPTION, examples=EXAMPLES)
    # Here, as torch comes with it, which takes a second, and --help need not wait for that.
    from autoregressive.sample.job import run_name, run_settings, start_processes
    from autoregressive.sample.prompts import read_prompts, require_text, tell
    from autoregressive.sample.run_folder import RunFolder, npy_bytes
    from autoregressive.sample.sampler import Blueprint, Sampler, image_seeds
    from autoregressive.sample.text import TextConditions, told_left_out

    require_text(options)
    run = options.run
    if options.text.prompt_file == "-":
        raise OptionError("text.prompt_file: a job may be started again, so it can't read stdin: name a file")
    prompts = read_prompts(options.text).first(run.num_fid_samples)
    notes = prompts.notes(wanted=run.num_fid_samples if options.text.prompt_file else None)
    run.num_fid_samples = len(prompts.texts)

    state = start_processes(run.cpu)
    if state.is_main_process:
        tell(notes)
    blueprint = Blueprint(options.model, state.device)
    conditions = TextConditions(options, prompts, state.device)
    if run.image_size_eval is None:
        run.image_size_eval = options.model.image_size
    seeds = image_seeds(run.seed, run.num_fid_samples)
    folder = RunFolder(Path(run.sample_dir) / run_name(options, prompts.name), run.num_fid_samples, run.image_size_eval)

    def encode(images: Sequence[int]) -> None:
        if state.is_main_process:
            found = conditions.left_out()
            folder.note(prompts=found)
            tell(told_left_out(found))
        conditions.encode(images, show=state.is_main_process)

    return {
        "state": state,
        "folder": folder,
        "batch_size": run.per_proc_batch_size,
        "settings": run_settings(options, blueprint, state.device)
        | {"text.prompts": prompts.digest(), "text.encoder": conditions.encoder.fingerprint()},
        "details": {
            "config": options.values(),
            "notes": notes,
            "seeds": "seeds.npy: numpy's SeedSequence(run.seed, spawn_key=(index,)) each",
        },
        "files": prompts.files() | {"seeds.npy": npy_bytes(seeds)},
        "seeds": seeds,
        "encode": encode,
        "load": lambda: Sampler(blueprint, options, state.device),
        "conditions": conditions,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    arguments = job(argv)
    from autoregressive.sample.job import run_job, told

    record = run_job(**arguments)
    if arguments["state"].is_main_process:
        print(told(arguments["folder"], record))


if __name__ == "__main__":
    guarded(main)
