"""Several processes that prune one model: each its share of a layer's experts.

Every process runs every layer, because that is cheap; moments and pruning, which are not, are
split by expert, and the results are handed round before the next weight.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Team:
    """This process among those that work together; one alone is a team too."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Team:
        """The processes that torchrun started, joined if they are not yet; else this one alone."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
                return cls()
            # both backends, so that results travel from wherever they are
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def device(self) -> torch.device:
        """A GPU for each process of a machine, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", "0")) if self.size > 1 else 0
        return torch.device("cuda", local % torch.cuda.device_count())

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of ``count`` experts are one process's, this one's by default."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def exchange(self, *stacked: torch.Tensor) -> None:
        """Fill in the others' experts of tensors ``[E, ...]``, of which each has its own share."""
        for rank in range(self.size if self.size > 1 else 0):
            share = self.share(stacked[0].shape[0], rank)
            for tensor in stacked if share else ():
                # NOTE: gloo knows no bool and no bf16 everywhere, and bytes are bytes
                part = tensor[share.start : share.stop].contiguous()
                dist.broadcast(part.view(torch.uint8), src=rank)
                tensor[share.start : share.stop] = part

    def gather(self, mine: Any) -> list[Any]:
        """What each process has, in the order of ranks; small things only."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def follow(self, value: Any) -> Any:
        """The value that the leading process has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def follow_tensor(self, tensor: torch.Tensor) -> None:
        """Take the values that the leading process has, in place."""
        if self.size > 1:
            part = tensor.contiguous()
            dist.broadcast(part.view(torch.uint8), src=0)
            tensor.copy_(part)
