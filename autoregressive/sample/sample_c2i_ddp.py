"""Sample many class-conditional images with any number of processes, for FID and the like. See --help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import Options, parse_options  # noqa: E402

DESCRIPTION = """\
Fill a run folder with class-conditional images: PNGs, tokens, labels, samples.npz (arr_0, uint8 NHWC) and run.json.

Image i depends on the seed, its index and its class alone, not on the number of processes or the batch size. Killed at
any moment and started again with the same command, the job goes on where it was."""
EXAMPLES = """\
examples:
  one process, on whatever device there is; 64 images of the models that ship with the project
    python autoregressive/sample/sample_c2i_ddp.py --config configs/demo.yaml --num-fid-samples 64
  eight GPUs, 50 000 images of LlamaGen-XL with 256 of 576 tokens cached
    torchrun --standalone --nproc-per-node 8 autoregressive/sample/sample_c2i_ddp.py \\
        --config configs/c2i_XL_384_adsa256.yaml
  the same by flags alone, as in LlamaGen
    torchrun --standalone --nproc-per-node 8 autoregressive/sample/sample_c2i_ddp.py \\
        --gpt-model GPT-XL --gpt-ckpt pretrained_models/c2i_XL_384.pt --vq-ckpt pretrained_models/vq_ds16_c2i.pt \\
        --image-size 384 --image-size-eval 256 --cfg-scale 1.75 --cache-policy adsa --cache-budget 256"""


def job(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What :func:`run_job` is to be called with, for these arguments; no model is read yet. None: the process's own."""
    options = parse_options(Options(), argv, script="job", description=DESCRIPTION, examples=EXAMPLES)
    import torch  # here, as it takes a second, which --help need not wait for

    from autoregressive.sample.job import run_name, run_settings, start_processes
    from autoregressive.sample.labels import Classes, assign, require_classes
    from autoregressive.sample.run_folder import RunFolder, npy_bytes
    from autoregressive.sample.sampler import Blueprint, Sampler, image_seeds

    require_classes(options)
    state = start_processes(options.run.cpu)
    blueprint = Blueprint(options.model, state.device)
    run = options.run
    if run.image_size_eval is None:
        run.image_size_eval = min(256, options.model.image_size)

    classes = Classes(options.model, run)
    given = run.class_labels
    drawn = list(range(classes.count)) if given is None else classes.ids(given, "run.class_labels")
    labels = assign(drawn, run.num_fid_samples, run.label_distribution, run.seed)
    seeds = image_seeds(run.seed, run.num_fid_samples)

    folder = RunFolder(Path(run.sample_dir) / run_name(options), run.num_fid_samples, run.image_size_eval)
    return {
        "state": state,
        "folder": folder,
        "batch_size": run.per_proc_batch_size,
        "settings": run_settings(options, blueprint, state.device) | {"run.class_labels": given and drawn},
        "details": {
            "config": options.values(),
            "seeds": "seeds.npy: numpy's SeedSequence(run.seed, spawn_key=(index,)) each",
        },
        "files": {"labels.npy": npy_bytes(labels), "seeds.npy": npy_bytes(seeds)},
        "seeds": seeds,
        "load": lambda: Sampler(blueprint, options, state.device),
        "conditions": lambda batch: (torch.from_numpy(labels[batch.start : batch.stop]), None),
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
