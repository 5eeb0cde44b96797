"""A training step's forward and backward passes as one CUDA graph.

A small model's kernels are shorter than their launches, and a GPU waits for those. Recorded once,
all of a step are launched together (CUDA C++ Programming Guide, "CUDA Graphs"). A step of sequences
of 1024 tokens, one by one and recorded, in ms (H200, torch 2.11, transformers 5.17, 171fddc): one
sequence and a Mixtral of 111 M parameters 80.0 and 19.5, a Qwen2-MoE of 105 M 127.9 and 27.1; two
sequences and the latter 145.7 and 32.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

import torch

from samoyeds_hf.errors import CalibrationError, ConfigError
from samoyeds_hf.pruning.masters import Masters

if TYPE_CHECKING:
    from samoyeds_hf.pruning.distill_settings import DistillSettings

# Sequences [B, S] on any device -> losses, on the models' device; the masters have gradients then.
Passes: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_EAGER = 3  # calls before the one that is recorded: what is made only once is there then


def check_recordable(devices: Iterable[torch.device], settings: DistillSettings) -> None:
    """Refuse what no graph can hold: work on several devices, steps of several micro-batches.

    Raises:
        CalibrationError: the devices are not one GPU.
        ConfigError: the micro-batches.
    """
    found = sorted(set(map(str, devices)))
    if len(found) != 1 or torch.device(found[0]).type != "cuda":
        raise CalibrationError(
            "A CUDA graph needs all that is trained on one GPU, found it on "
            f"{', '.join(found)}; leave cuda_graph out."
        )
    if settings.micro_batch_size not in (None, settings.batch_size):
        raise ConfigError(
            "A CUDA graph needs all of a step's sequences at a time, found micro_batch_size "
            f"{settings.micro_batch_size} of {settings.batch_size}; leave one of both out."
        )


class RecordedPasses:
    """Passes that are launched together from the fourth call on.

    Every call has to have as many sequences as the first, and to find the masters without
    gradients: a graph writes where it was recorded, and adds to nothing.

    Args:
        passes: what is recorded; it must not wait for the GPU.
        masters: in whose gradients it ends.
        device: the GPU that all is on.

    Raises:
        CalibrationError: at the fourth call, passes that cannot be recorded, as those that wait for
            the GPU.
        torch.OutOfMemoryError: a GPU too small for them.
    """

    def __init__(self, passes: Passes, masters: Masters, device: torch.device) -> None:
        self._passes, self._masters, self._device = passes, masters, device
        # One stream for all calls: what autograd keeps from one to the next belongs to it.
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()
        self._tokens = self._losses = torch.empty(0)
        self._grads: dict[str, torch.Tensor | None] = {}

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The passes on sequences ``[B, S]`` int64; what they return, until the next call."""
        self._calls += 1
        if self._calls <= _EAGER:
            return self._eager(tokens)
        if self._calls == _EAGER + 1:
            self._record(tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        for name, grad in self._grads.items():
            self._masters.values[name].grad = grad
        return self._losses

    def _eager(self, tokens: torch.Tensor) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            losses = self._passes(tokens)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return losses

    def _record(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens.to(self._device, copy=True)
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._losses = self._passes(self._tokens)
        except RuntimeError as error:
            # What went wrong inside makes the end of the recording fail, too, and says less.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            said = str(cause).partition("\n")[0]
            raise CalibrationError(
                "A CUDA graph needs passes that do not wait for the GPU, found that they cannot be "
                f"recorded ({said}); leave cuda_graph out."
            ) from error
        self._grads = {name: master.grad for name, master in self._masters.values.items()}
