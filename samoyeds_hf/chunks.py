"""How many rows are worked on at once, so that temporaries stay small."""

from __future__ import annotations

import torch

_ON_CPU = 1 << 18  # dense elements: temporaries stay in the cache
_ELSEWHERE = 1 << 24  # a GPU would spend its time on launches; temporaries are below 0.5 GB


def rows_per_chunk(rows_per_block: int, k: int, device: torch.device) -> int:
    """Rows ``[.., k]`` to take at once: whole blocks, at least one."""
    elements = _ON_CPU if device.type == "cpu" else _ELSEWHERE
    return max(1, elements // (rows_per_block * k)) * rows_per_block
