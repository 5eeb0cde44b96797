"""The command ``samoyeds`` in tests: what it printed, and the sentence of a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A program that is stopped by a signal when a layer is done, and its state is written.
STOPPED = """\
import os, signal, sys
from samoyeds_hf import cli
from samoyeds_hf.conversion_state import ConversionState
# a shell starts its background jobs with Ctrl-C ignored, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
finish = ConversionState.finish
def stop(self, *rest):
    finish(self, *rest)
    os.kill(os.getpid(), signal.{signal})
ConversionState.finish = stop
cli.main()
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


def in_subprocess(*arguments: object, cwd: Path | None = None, **environment: str) -> Done:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refusal(done: Done) -> str:
    """The one sentence of an error that was foreseen: nothing else is printed."""
    assert done.code == 1, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(".")
    return line
