"""What a reader needs to judge a number: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """Columns for every row of a result file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of the checkout; SAMOYEDS_COMMIT names it where the history did not come along."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, check=False, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("SAMOYEDS_COMMIT", "") or "uncommitted"
