"""How scripts end. Imports nothing that takes time, so that `--help` is there at once."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

EXPECTED = (
    ("builtins", "OSError"),
    ("torch", "OutOfMemoryError"),
    ("autoregressive.sample.options", "OptionError"),
    ("autoregressive.models.checkpoint", "CheckpointError"),
    ("autoregressive.sample.run_folder", "RunError"),
    ("tokenizer.tokenizer_text.encoder", "TextEncoderError"),
)


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
    """What to say of an error that tells its cause and a way out; None: of one that nobody foresaw.

    Imports nothing: a class that isn't there yet can't have been raised.
    """
    for module, kind in EXPECTED:
        if isinstance(error, getattr(sys.modules.get(module), kind, ())):
            advice = "; fewer images at a time need less (in a job: --per-proc-batch-size)" if module == "torch" else ""
            return f"{error}{advice}"
    return None
