"""What recovery trains: fp32 masters of weights, of a masked weight only what its mask keeps.

The model stays as it is, in its own dtype: a backward pass fills the masters' gradients, an
optimizer changes the masters, and :meth:`Masters.write` puts them back at their places. Nothing
else of a masked weight is ever written, so its mask holds exactly. Bytes a dense weight of which a
share d is kept, with Adam on top: ``(4 master + 4 gradient + 8 moments + 4 place) d``, that is 5 at
d = 1/4 where masks on dense masters would take 16. For one weight at a time come its dense gradient
in a backward pass and, when that is gone, up to ``10 d`` in a step, which writes at int64 places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pruning.cautious import CautiousAdam
from samoyeds_hf.pruning.training import digest

WIDTH = 1024  # inputs of a weight for which a learning rate is meant as it is
# Learning rate of a weight without a mask, to that of one with a mask. Held-out perplexity of
# tests/assets/tiny-moe after 100 steps: 1.0 20.98, 0.3 16.75, 0.1 16.49, without these 17.03.
UNPRUNED = 0.1
_CHUNK = 1 << 28  # elements of a mask at a time
_DTYPES = (torch.bfloat16, torch.float32)  # gradients in fp16 would underflow


class Masters:
    """Trainable fp32 copies of some weights of a model.

    Args:
        weights: the model's parameters by name, in bf16 or fp32.
        masks: bool, of the shape of the weight; a weight without one is trained whole. What lies
            outside a mask is set to 0.

    Raises:
        CalibrationError: a weight in another dtype, or a mask that does not fit.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.weights = dict(weights)
        self._places: dict[str, torch.Tensor] = {}  # [kept] int32 where that is enough
        self.values: dict[str, nn.Parameter] = {}  # [kept], or of the weight's shape
        for name, weight in self.weights.items():
            _check(name, weight, masks.get(name))
        for name, weight in self.weights.items():
            if name in masks:
                mask = masks[name].to(weight.device)
                self._places[name] = _places(mask)
                weight.data = weight.detach().contiguous().masked_fill_(~mask, 0)
            master = self._kept(name, weight.detach()).to(torch.float32, copy=True)
            self.values[name] = nn.Parameter(master)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside, only these weights get gradients, and those go straight to the masters."""
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        hooks = []
        for name, weight in self.weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(self._taking(name)))
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters to the weights' dtype and put them at their places."""
        for name, weight in self.weights.items():
            master = self.values[name].to(weight.dtype)
            if name in self._places:
                weight.view(-1)[self._places[name]] = master
            else:
                weight.copy_(master)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take other masters and write them."""
        for name, master in self.values.items():
            master.copy_(values[name])
        self.write()

    def step(self, optimizer: torch.optim.Optimizer, rate: float, max_norm: float) -> float:
        """One step with the gradients gathered since the last, written to the weights.

        ``rate`` is that of weights with ``WIDTH`` inputs; others take it in inverse proportion, so
        that one rate serves small and large models (Yang et al. 2022, arXiv 2203.03466, table 8),
        and those without a mask ``UNPRUNED`` of it, because they have nothing to make up for.
        Gradients are scaled down to ``max_norm`` together if they are larger; returns what their
        norm was. Weights that no gradient reached, as those of an expert in a list that no token
        was routed to, have one of zeros.
        """
        for master in self.values.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        norm = float(nn.utils.clip_grad_norm_(self.values.values(), max_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.write()
        return norm

    def is_masked(self, name: str) -> bool:
        """Whether only a part of a weight is trained."""
        return name in self._places

    def digest_places(self) -> str:
        """A checksum of what is trained of which weight."""
        return digest(self._places)

    def _taking(self, name: str) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def take(weight: torch.Tensor) -> None:
            if weight.grad is None:
                return
            master = self.values[name]
            grad = self._kept(name, weight.grad).to(torch.float32)
            weight.grad = None  # at once: the next weight's dense gradient takes its memory
            master.grad = grad if master.grad is None else master.grad.add_(grad)

        return take

    def _kept(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        if name not in self._places:
            return dense
        return dense.reshape(-1).index_select(0, self._places[name])


# What make_optimizer and training.schedule are: nothing that others began is gone on with.
OPTIMIZER = "cautious Adam, linear decay"


def make_optimizer(masters: Masters) -> torch.optim.Optimizer:
    """Cautious Adam, with a group for each learning rate."""
    widest = max(weight.shape[-1] for weight in masters.weights.values())
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in masters.weights.items():
        scale = WIDTH / (weight.shape[-1] if weight.ndim > 1 else widest)
        scale *= 1.0 if masters.is_masked(name) else UNPRUNED
        groups.setdefault(scale, []).append(masters.values[name])
    return CautiousAdam({"params": group, "scale": scale} for scale, group in groups.items())


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask is true, as numbers of the flat weight; in int32 where that is enough.

    In chunks, because nonzero() answers in int64 and does not take 2^31 elements on a GPU.
    """
    dtype = torch.int64 if mask.numel() >= 2**31 else torch.int32
    chunks = mask.reshape(-1).split(_CHUNK)
    found = (chunk.nonzero().view(-1).to(dtype) for chunk in chunks)
    return torch.cat([places + number * _CHUNK for number, places in enumerate(found)])


def _check(name: str, weight: torch.Tensor, mask: torch.Tensor | None) -> None:
    if weight.dtype not in _DTYPES or weight.is_meta:
        found = "on meta" if weight.is_meta else f"in {weight.dtype}"
        raise CalibrationError(
            f"{name} must be in memory in bf16 or fp32 to be trained, found it {found}; load the "
            "model so."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise CalibrationError(
            f"The mask of {name} must be bool of shape {list(weight.shape)}, found {mask.dtype} of "
            f"{list(mask.shape)}; take it from the same model."
        )
