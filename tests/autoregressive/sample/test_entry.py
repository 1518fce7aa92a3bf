"""How scripts end, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest

from autoregressive.sample.options import ROOT


def ended(statement: str, **environment: str) -> subprocess.CompletedProcess:
    """A script whose teardown by the interpreter would abort it."""
    script = f"""\
import atexit, os, sys
from autoregressive.sample.entry import guarded

def main():
    print("work")
    {statement}

atexit.register(os.abort)
guarded(main)
"""
    clean = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("statement", "code", "told"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no more')", 1, "no more\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise OSError('a full disk')", 1, "[process 1] error: a full disk\n"),
    ],
)
def test_a_process_of_torchruns_ends_without_teardown(statement, code, told):
    process = ended(statement, RANK="1")
    assert (process.returncode, process.stdout, process.stderr) == (code, "work\n", told)


def test_a_process_alone_ends_as_usual():
    assert ended("").returncode == -signal.SIGABRT
