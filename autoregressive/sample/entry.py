"""How scripts end. Imports nothing that takes time, so that `--help` is there at once."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def guarded(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function and end the process: expected errors as one message, and never a hang.

    torchrun stops all processes as soon as one ends with an error.
    """
    rank = os.environ.get("RANK")
    code: int | str | None = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = 1
        if (message := _expected(error)) is None:
            traceback.print_exc()
        else:
            print(f"{'' if rank is None else f'[process {rank}] '}error: {message}", file=sys.stderr)
    if rank is not None and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)  # without waiting for the others at exit
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(code)


def _expected(error: Exception) -> str | None:
    """What to say of an error that tells its cause and a way out; None: of one that nobody foresaw."""
    import torch

    from autoregressive.models.checkpoint import CheckpointError
    from autoregressive.sample.options import OptionError
    from autoregressive.sample.run_folder import RunError
    from tokenizer.tokenizer_text.encoder import TextEncoderError

    if isinstance(error, torch.OutOfMemoryError):
        return f"{error}; fewer images at a time need less (in a job: --per-proc-batch-size)"
    if isinstance(error, OptionError | CheckpointError | TextEncoderError | RunError | OSError):
        return str(error)
    return None
