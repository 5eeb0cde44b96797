"""What every sparse module does with its weights: hold, pack, move, save and copy them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from samoyeds_hf import packed
from samoyeds_hf.errors import SamoyedsError
from samoyeds_hf.format import SUFFIXES, SparseWeight, decode, stored_shapes, validate
from samoyeds_hf.packed import PackedSpec
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.ranks import is_plain, local_part, shared_like, why_not_local

_HOME = "_home"  # in a pickle: an empty tensor on the device where the weights were packed


class SparseModule(nn.Module):
    """Holds weights as parameters (never trained), each in one of two states.

    Canonical: ``name``, ``name_meta`` and ``name_index``. Parameters and not buffers: only those
    are sharded over ranks and offloaded. The dense name on the values is a guard: without this
    package transformers stops with a size mismatch there.

    Packed: ``name`` alone, ``[E, P]`` in the kernels' own order, for a module that lies on a GPU
    which the kernels serve. ``.to()``, ``state_dict()``, ``load_state_dict()`` and pickles give and
    take canonical tensors all the same, one weight at a time; ``state_dict()`` gives them on the
    CPU, because the GPU may be full.
    """

    def __init__(self, dense: nn.Module, patterns: Mapping[str, SparsityPattern]) -> None:
        super().__init__()
        self.patterns = dict(patterns)
        self._texts = {name: str(pattern) for name, pattern in self.patterns.items()}
        self._specs: dict[str, PackedSpec] = {}  # of the weights that are packed now
        # Not registered as a child: an empty copy of the module replaced, for its gate function,
        # its scalars, and unpatch_model.
        vars(self)["_dense"] = _without_weights(dense)
        for name, pattern in self.patterns.items():
            weight = dense.get_parameter(name)
            shapes = stored_shapes(weight.shape, pattern)
            dtypes = (weight.dtype, torch.uint8, torch.uint8)
            empty = [
                torch.empty(shape, dtype=dtype, device="meta")
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            self._hold(name, empty)

    @property
    def is_packed(self) -> bool:
        """Whether the kernels read every weight as it lies."""
        return len(self._specs) == len(self.patterns)

    @property
    def num_uncounted(self) -> int:
        """Elements that the canonical tensors have more than what is registered now."""
        canonical = held = 0
        for name, spec in self._specs.items():
            shapes = stored_shapes((spec.experts, spec.rows, spec.cols), spec.pattern)
            canonical += sum(math.prod(shape) for shape in shapes)
            held += local_part(self._tensor(name)).numel()
        return canonical - held

    def stored(self, name: str) -> SparseWeight:
        """The three canonical tensors of one weight; fresh ones if it is packed.

        Raises:
            KernelError: it is packed, and was taken off the GPU by other means than ``.to()``.
        """
        spec = self._specs.get(name)
        if spec is None:
            return SparseWeight(*(self._tensor(name + suffix) for suffix in SUFFIXES))
        tensor = self._tensor(name)
        stacked = packed.unpack(local_part(tensor), spec)
        parts = stacked if self._is_stacked(name) else (part[0] for part in stacked)
        return SparseWeight(*(shared_like(part, tensor) for part in parts))

    def store(self, name: str, weight: SparseWeight) -> None:
        """Replace one weight by canonical tensors; :meth:`pack_` packs it again."""
        self._specs.pop(name, None)
        self._hold(name, weight)

    def pack_(self) -> str | None:
        """Bring every weight into the kernels' order, one at a time; None, or why it cannot be.

        Where it cannot be, nothing changes.
        """
        reason = self._why_not_packed()
        if reason is None:
            for name in [name for name in self.patterns if name not in self._specs]:
                spec, stored = self._spec(name), self.stored(name)
                parts = (local_part(part) for part in stored)
                stacked = parts if self._is_stacked(name) else (part[None] for part in parts)
                tensor = packed.pack(SparseWeight(*stacked), spec)
                self._hold(name, [shared_like(tensor, stored.values)])
                self._specs[name] = spec
                del stored, parts, stacked
                packed.settle(tensor)
        return reason

    def unpack_(self) -> None:
        """Bring every weight back into the canonical order, one at a time.

        Raises:
            KernelError: see :meth:`stored`.
        """
        for name in list(self._specs):
            stored = self.stored(name)
            self.store(name, stored)
            packed.settle(stored.values)

    def dense_shape(self, name: str) -> torch.Size:
        """Shape of one weight before it became sparse."""
        return self._dense_module.get_parameter(name).shape

    def to_dense(self) -> nn.Module:
        """The module that was replaced, with the pruned weights."""
        dense = copy.copy(self._dense_module)
        dense._parameters = dict(dense._parameters)
        for name, pattern in self.patterns.items():
            weight = decode(self.stored(name), pattern)
            trainable = dense.get_parameter(name).requires_grad
            dense.register_parameter(name, nn.Parameter(weight, requires_grad=trainable))
        return dense.train(self.training)

    @property
    def _dense_module(self) -> nn.Module:
        module: nn.Module = vars(self)["_dense"]
        return module

    def _tensor(self, key: str) -> torch.Tensor:
        # Not get_parameter(): while experts are split over ranks, transformers puts plain tensors
        # in their place for the time of a forward.
        return cast(torch.Tensor, getattr(self, key))

    def _hold(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Register the three tensors of a weight, or the packed one, in place of what it had."""
        keys = [name + suffix for suffix in SUFFIXES]
        held = {key: value for key, value in self._parameters.items() if key not in keys}
        for key, tensor in zip(keys, tensors, strict=False):
            held[key] = nn.Parameter(tensor, requires_grad=False)
        # A state_dict lists them in this order, whatever happened before.
        order = [weight + suffix for weight in self.patterns for suffix in SUFFIXES]
        self._parameters.clear()
        self._parameters.update({key: held[key] for key in order if key in held})

    def _is_stacked(self, name: str) -> bool:
        return len(self.dense_shape(name)) == 3  # [E, m, k]; else a single [m, k]

    def _spec(self, name: str) -> PackedSpec:
        values, pattern = local_part(self._tensor(name)), self.patterns[name]
        *lead, kept, half_cols = values.shape
        return PackedSpec(
            experts=lead[0] if lead else 1,
            rows=kept // pattern.n * pattern.m,
            cols=half_cols * 2,
            pattern=pattern,
            dtype=values.dtype,
            is_gate_up=name == "gate_up_proj",
        )

    def _why_not_packed(self) -> str | None:
        hook = getattr(self, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,))):
            return "accelerate offloads the weights"
        for name in [name for name in self.patterns if name not in self._specs]:
            stored = self.stored(name)
            devices = {part.device for part in stored}
            if len(devices) > 1:
                return f"the tensors of a weight are on {sorted(map(str, devices))}"
            here = getattr(self, "num_experts", None)  # expert parallel has lowered it
            split = (why_not_local(part, here) for part in stored)
            reason = next(filter(None, split), None) or packed.why_not(
                self._spec(name), stored.values.device
            )
            if reason is not None:
                return reason
        return None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """What ``.to()`` and its like do; they meet canonical tensors, never packed bytes."""
        if not self._is_left_alone_by(fn):
            self.unpack_()
        kept = {id(self._tensor(name)) for name in self._specs}
        super()._apply(lambda t: t if id(t) in kept else fn(t), recurse)  # type: ignore[no-untyped-call]
        self.pack_()
        return self

    def _is_left_alone_by(self, fn: Callable[..., Any]) -> bool:
        """Whether fn hands packed weights back as they are, as ``.to()`` where nothing changes.

        Then they keep their addresses, which CUDA graphs have captured.
        """
        tensors = [self._tensor(name) for name in self._specs]
        for device in {tensor.device for tensor in tensors}:
            for dtype in {tensor.dtype for tensor in tensors} | {torch.uint8}:
                probe = torch.ones(1, dtype=dtype, device=device)
                if fn(probe) is not probe or int(probe) != 1:
                    return False
        return True

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if not self._specs:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name in self.patterns:
            # NOTE: what is split over ranks is gathered by a collective, which needs the GPU.
            values = self._tensor(name)
            stays = name not in self._specs or local_part(values) is not values
            for suffix, part in zip(SUFFIXES, self.stored(name), strict=True):
                part = part if keep_vars else part.detach()
                destination[prefix + name + suffix] = part if stays else part.cpu()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unpack_()
        try:
            self._check_incoming(state_dict, prefix)
        except SamoyedsError as error:
            error_msgs.append(str(error))
        else:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        self.pack_()

    def _check_incoming(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse what a kernel could not read safely; what has another shape is torch's to say."""
        for name, pattern in self.patterns.items():
            parts: list[Any] = [state_dict.get(prefix + name + suffix) for suffix in SUFFIXES]
            shapes = [self._tensor(name + suffix).shape for suffix in SUFFIXES]
            if all(
                is_plain(part) and not part.is_meta and part.shape == shape
                for part, shape in zip(parts, shapes, strict=True)
            ):
                validate(SparseWeight(*parts), pattern, name=prefix + name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Packed bytes may be copied as they are: the library that reads them is the same.
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: canonical, because another process may have no kernels, or other ones."""
        state = dict(vars(self))
        if self._specs:
            device = self._tensor(next(iter(self._specs))).device
            tensors: dict[str, torch.Tensor] = {}
            self._save_to_state_dict(tensors, "", keep_vars=False)
            state["_parameters"] = {
                key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()
            }
            state["_specs"] = {}
            state[_HOME] = torch.empty(0, device=device)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Weights return to the device where they were packed, or where ``map_location`` says."""
        state = dict(state)
        home = state.pop(_HOME, None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if home is not None:
            self.to(home.device)


def _without_weights(module: nn.Module) -> nn.Module:
    """A shallow copy whose own parameters are on meta; hooks of accelerate stay behind."""
    shell = copy.copy(module)
    shell._parameters = {
        name: None
        if parameter is None
        else nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for name, parameter in module._parameters.items()
    }
    for name in ("_hf_hook", "_old_forward", "forward"):
        vars(shell).pop(name, None)
    return shell
