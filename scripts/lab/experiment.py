"""Prunes copies of one trained model, cell by cell, and measures what is left of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lab.cells import BLOCK, COLUMNS, DENSE, KERNELS, NONE, PASSES, PERMUTE, PROBED, UNEVEN, Cell
from lab.corpus import Corpus
from lab.measure import Task, accuracy, perplexity
from lab.patterns import PatternLike, pattern_of, size_of
from lab.recipes import Options, budgeted, columns_alone, probe, probed
from lab.training import Trained
from transformers import PreTrainedModel

from samoyeds_hf import SamoyedsConfig, SparsityPattern, patch_model
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.recover import PASSES as PASSES_OF_BLOCKS
from samoyeds_hf.pruning.recover import BlockSettings
from samoyeds_hf.pruning.walk import prune_model
from samoyeds_hf.selection import select

_PROBE_METHOD = "wanda+refine"  # cheap, and better masks do not change which weights matter


@dataclass(frozen=True)
class LabSettings:
    """How models are pruned, recovered and measured."""

    samples: int  # calibration sequences of the model's context
    eval_tokens: int
    probe_tokens: int  # for the loss of one weight pruned alone
    batch: int  # sequences of a forward pass
    share: float  # of the training tokens that distillation may see
    distill_batch: int
    distill_lr: float
    distill_hidden: float  # weight of the hidden states
    distill_train: str
    seed: int


@dataclass(frozen=True)
class Sparse:
    """A pruned model: zero outside its masks."""

    model: PreTrainedModel
    masks: dict[str, torch.Tensor]
    error: float  # relative output error, mean over experts and weights
    share: float | None  # of the bytes of the dense weights; None is no format of ours
    seconds: float
    notes: int  # how many experts a method said something about


class Laboratory:
    """One trained model, the text to prune and measure it with, and the last pruned copy."""

    def __init__(
        self, trained: Trained, corpus: Corpus, tasks: list[Task], settings: LabSettings
    ) -> None:
        self.trained, self.corpus, self.tasks, self.settings = trained, corpus, tasks, settings
        self.dense, self.context = trained.model, trained.model.config.max_position_embeddings
        self.modules = _modules(trained.model)
        two_of_four = SamoyedsConfig("2:4", modules=self.modules)
        self.names = list(select(self.dense, two_of_four).targets)
        self.calibration = corpus.shuffled(settings.samples, self.context, settings.seed + 1)
        count = max(1, settings.eval_tokens // self.context)
        self.heldout = corpus.windows("heldout", count, self.context).to(trained.device)
        self.dense_perplexity = perplexity(self.dense, self.heldout)
        self._last: tuple[Cell, Sparse] | None = None
        self._probed: dict[SparsityPattern, Options] = {}

    def weight(self, name: str) -> torch.Tensor:
        """A dense weight, ``[E, O, K]`` or ``[O, K]``."""
        return self.dense.get_parameter(name).data

    def measure(self, cell: Cell) -> dict[str, object]:
        """The columns of one row."""
        start = time.perf_counter()
        if cell.pattern == DENSE:
            return {**self._evaluate(self.dense), "seconds": f"{self._since(start):.2f}"}
        sparse = self._pruned(cell)
        model, values = sparse.model, self._about(sparse)
        if BLOCK in cell.steps:
            values["block"] = f"{PASSES_OF_BLOCKS} passes, {self._block.train}"
        for step in cell.steps:
            if step in PASSES:
                model, columns = self._distilled(sparse, PASSES[step])
                values |= columns
        if cell.path == KERNELS:
            model = self._encoded(model, cell)
        values |= self._evaluate(model)
        if cell.path != KERNELS:
            values["kept"] = f"{self._share_kept(model):.5f}"
        return {**values, "seconds": f"{self._since(start):.2f}"}

    def prune(
        self,
        patterns: Mapping[str, PatternLike],
        method: str,
        *,
        permute: bool = False,
        block: bool = False,
    ) -> Sparse:
        """A copy of the dense model, pruned by calibration with the training text."""
        start = time.perf_counter()
        model = copy.deepcopy(self.dense)
        settings = self._settings(method, permute=permute, block=block)
        weights = prune_model(model, patterns, self.calibration, settings)
        return Sparse(
            model,
            {weight.name: weight.mask for weight in weights},
            sum(weight.error for weight in weights) / len(weights),
            self._share_of_bytes(patterns),
            self._since(start),
            sum(len(weight.notes) for weight in weights),
        )

    @property
    def _block(self) -> BlockSettings:
        return BlockSettings(seed=self.settings.seed)

    def _settings(
        self, method: str, *, permute: bool = False, block: bool = False
    ) -> PruneSettings:
        name, *more = method.split("+")
        return PruneSettings(
            name,
            refine="refine" in more,
            asymmetric="asymmetric" in more,
            batch_size=self.settings.batch,
            block=self._block if block else None,
            permute=permute,
        )

    def _pruned(self, cell: Cell) -> Sparse:
        """The last pruned copy, if it is the one that a cell begins with."""
        steps = [step for step in cell.steps if step not in PASSES]
        first = Cell(cell.pattern, cell.method, "+".join(steps) or NONE, cell.ideas)
        if self._last is None or self._last[0] != first:
            self._last = None  # its memory first
            ideas = cell.ideas.split("+")
            patterns = self._patterns(cell.pattern, cell.method, ideas)
            sparse = self.prune(
                patterns, cell.method, permute=PERMUTE in ideas, block=BLOCK in steps
            )
            self._last = (first, sparse)
        return self._last[1]

    def _patterns(self, text: str, method: str, ideas: list[str]) -> dict[str, PatternLike]:
        """The pattern of each weight; the ideas keep the bytes of the pattern named."""
        if not {UNEVEN, PROBED, COLUMNS}.intersection(ideas):
            return dict.fromkeys(self.names, pattern_of(text))
        budget = SparsityPattern.parse(text)
        if UNEVEN in ideas:
            settings = self._settings(method)
            patterns = budgeted(self.dense, self.names, budget, self.calibration, settings)
        else:
            weights = {name: self.weight(name) for name in self.names}
            options = self._options(budget)
            if COLUMNS not in ideas:
                options = {n: [o for o in all_ if not o.has_columns] for n, all_ in options.items()}
            patterns = (probed if PROBED in ideas else columns_alone)(options, budget, weights)
        for name, pattern in patterns.items():
            print(f"    {name}: {pattern}", flush=True)
        return patterns

    def _options(self, pattern: SparsityPattern) -> Options:
        """What each candidate costs for each weight; measured once."""
        if pattern not in self._probed:
            start = time.perf_counter()
            count = max(1, self.settings.probe_tokens // self.context)
            text = self.corpus.shuffled(count, self.context, self.settings.seed + 3)
            weights = {name: self.weight(name) for name in self.names}

            def pruned(patterns: Mapping[str, PatternLike]) -> PreTrainedModel:
                return self.prune(patterns, _PROBE_METHOD).model

            self._probed[pattern] = probe(
                self.dense, weights, pattern, pruned, text.to(self.dense.device)
            )
            print(f"    probed every weight in {self._since(start):.0f} s", flush=True)
        return self._probed[pattern]

    def _distilled(self, sparse: Sparse, passes: int) -> tuple[PreTrainedModel, dict[str, object]]:
        """A recovered copy, and the columns that say how."""
        start = time.perf_counter()
        batch, settings = self.settings.distill_batch, self.settings
        in_pass = max(1, int(settings.share * self.trained.tokens / (batch * self.context)))
        tokens = self.corpus.shuffled(in_pass * batch, self.context, settings.seed + 2)
        student = copy.deepcopy(sparse.model)
        recipe = DistillSettings(
            steps=in_pass * passes,
            batch_size=batch,
            learning_rate=settings.distill_lr,
            hidden_weight=settings.distill_hidden,
            train=settings.distill_train,
            seed=settings.seed,
        )
        is_cuda = self.dense.device.type == "cuda"
        report = distill(student, self.dense, tokens, sparse.masks, recipe, cuda_graph=is_cuda)
        return student, {
            "recover_s": f"{self._since(start):.2f}",
            "recover_tokens": tokens.numel(),
            "distill": f"{recipe.steps} x {batch}, lr {report.rates}, {recipe.train}, "
            f"hidden states x {recipe.hidden_weight:g}; held back {report.held_back}"
            + ("" if report.kept else ", no better and not kept"),
        }

    def _encoded(self, model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
        """The same weights, encoded and run by the package's own experts."""
        copied = copy.deepcopy(model)
        # magnitude finds the mask of a weight that is zero outside it
        patch_model(copied, config=SamoyedsConfig(cell.pattern, modules=self.modules))
        return copied

    def _evaluate(self, model: PreTrainedModel) -> dict[str, object]:
        start = time.perf_counter()
        value = perplexity(model, self.heldout)
        columns: dict[str, object] = {
            "perplexity": f"{value:.6g}",
            "ratio": f"{value / self.dense_perplexity:.6g}",
        }
        for task in self.tasks:
            found = accuracy(model, task)
            columns[task.name] = f"{found.plain:.4f}"
            columns[f"{task.name}_norm"] = f"{found.normalised:.4f}"
            columns[f"{task.name}_error"] = f"{found.error:.4f}"
            columns[f"{task.name}_chance"] = f"{task.chance:.4f}"
        return {**columns, "measure_s": f"{self._since(start):.3f}"}

    def _about(self, sparse: Sparse) -> dict[str, object]:
        return {
            "error": f"{sparse.error:.6g}",
            "bytes": "" if sparse.share is None else f"{sparse.share:.5f}",
            "prune_s": f"{sparse.seconds:.2f}",
            "notes": sparse.notes,
        }

    def _share_of_bytes(self, patterns: Mapping[str, PatternLike]) -> float | None:
        """Of the pruned weights when encoded beside dense ones, both in bf16."""
        sizes = [size_of(pattern, self.weight(name)) for name, pattern in patterns.items()]
        dense = sum(2 * self.weight(name).numel() for name in patterns)
        known = [size for size in sizes if size is not None]
        return sum(known) / dense if len(known) == len(sizes) else None

    def _share_kept(self, model: PreTrainedModel) -> float:
        """Weights that are not 0, counted: above the pattern's share if a mask did not hold."""
        weights = [model.get_parameter(name) for name in self.names]
        return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)

    def _since(self, start: float) -> float:
        """Seconds, with what the device has still to do."""
        if self.dense.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _modules(model: PreTrainedModel) -> tuple[str, ...]:
    """All experts that a model has."""
    shared = any("shared_expert" in name for name, _ in model.named_parameters())
    return ("experts", "shared_experts") if shared else ("experts",)
