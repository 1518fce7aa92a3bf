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

    A process of torchrun's ends without the interpreter's teardown: gloo's threads may still let go of Python's objects
    then, which aborts it (PyTorch's pull request 179291), and torchrun stops all as soon as one ends with an error.
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
    if rank is None:
        sys.exit(code)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        distributed = sys.modules.get("torch.distributed")
        if not code and distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()  # not after an error, as the others may never come
    finally:
        os._exit(code or 0)


def _expected(error: Exception) -> str | None:
    """What to say of an error that tells its cause and a way out; None: of one that nobody foresaw.

    Imports nothing: a class that isn't there yet can't have been raised.
    """
    for module, kind in EXPECTED:
        if isinstance(error, getattr(sys.modules.get(module), kind, ())):
            advice = "; fewer images at a time need less (in a job: --per-proc-batch-size)" if module == "torch" else ""
            return f"{error}{advice}"
    return None
