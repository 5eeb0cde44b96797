"""How far a conversion is: which shards are done, and what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import samoyeds_hf
from samoyeds_hf.directory import STATE_FILE
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.shards import ShardSpec, write_text

if TYPE_CHECKING:
    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.report import WeightReport


class ConversionState:
    """Which shards are done, and a fingerprint of what they were made from."""

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: dict[str, list[dict[str, Any]]] = {}  # shard -> its reports
        self.next_layer = 0  # of a calibrated conversion: all before it are pruned and written

    @classmethod
    def open(
        cls,
        directory: Path,
        plan: ConversionPlan,
        shard_size: int,
        more: Mapping[str, Any] | None = None,
    ) -> ConversionState:
        """A new state, or the one found, if it is of the same source and settings.

        Args:
            directory: where the checkpoint grows.
            plan: what is converted.
            shard_size: bytes of a shard.
            more: what else the result depends on.

        Raises:
            CheckpointError: unreadable, or of another conversion.
        """
        state = cls(directory / STATE_FILE, _fingerprint(plan, shard_size) | dict(more or {}))
        if not state.path.exists():
            state.save()
            return state
        try:
            found = json.loads(state.path.read_text(encoding="utf-8"))
            different = [
                k for k, v in state.fingerprint.items() if found["fingerprint"].get(k) != v
            ]
            state.done, state.next_layer = found["done"], int(found["next_layer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{state.path} must say what was converted, found it unreadable ({error!r}); start "
                "again with --overwrite."
            ) from error
        if different:
            raise CheckpointError(
                f"--resume must continue the same conversion, found another {different[0]} than in "
                f"{state.path}; start again with --overwrite."
            )
        return state

    def finish(
        self, shards: Mapping[str, Sequence[WeightReport]], next_layer: int | None = None
    ) -> None:
        """Note that shards are in place, with the reports of the weights in them."""
        for file, reports in shards.items():
            self.done[file] = [asdict(report) for report in reports]
        self.next_layer = self.next_layer if next_layer is None else next_layer
        self.save()

    def left(self, shards: Sequence[ShardSpec]) -> list[ShardSpec]:
        """Those that are still to be made."""
        folder = self.path.parent
        return [s for s in shards if s.file not in self.done or not (folder / s.file).exists()]

    def save(self) -> None:
        """Write it, in one step."""
        content = {
            "fingerprint": self.fingerprint,
            "done": self.done,
            "next_layer": self.next_layer,
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def _fingerprint(plan: ConversionPlan, shard_size: int) -> dict[str, Any]:
    files = sorted({s.file for u in plan.units for v in u.target.sources.values() for s in v})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps(stats).encode())
    digest.update((plan.source / "config.json").read_bytes())
    return {
        "source": digest.hexdigest(),
        "recipe": plan.config.to_dict(),
        "shard size": shard_size,
        "version of samoyeds-hf": samoyeds_hf.__version__,
    }
