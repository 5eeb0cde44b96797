"""lm-evaluation-harness on a sparse model, beside its dense original.

The harness (the extra ``eval``) is imported when an evaluation starts. It is driven by its own
public parts (TaskManager, HFLM, evaluate) rather than by ``simple_evaluate``, which loads the model
before the data sets, asks the Hub about local directories and prints git's complaints. Seeds,
few-shot samples and metrics are those of the ``lm_eval`` command: both give the same numbers.
"""

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from samoyeds_hf import __version__
from samoyeds_hf.errors import EvaluationError, SamoyedsError
from samoyeds_hf.eval_report import EvalReport, EvalRow, rows_from_results
from samoyeds_hf.eval_tasks import LOAD_ERRORS, first_line, load_tasks, prepare_tasks

__all__ = ["EvalReport", "EvalRow", "evaluate", "run"]

_MIN_LM_EVAL = "0.4.13"
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def evaluate(
    model_dir: str | Path,
    tasks: str | Sequence[str],
    *,
    against: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str = "auto",
    seed: int | None = None,
) -> EvalReport:
    """Run lm-eval tasks on a model and, with ``against``, on its dense original.

    Models are directories; they are in memory one after the other. ``tasks`` are names
    of tasks, groups and tags, or globs, in a list or comma-separated; ``include_path`` is a
    directory with more of them. ``limit`` takes the first samples of each task. ``device=None`` is
    the first GPU if there is one; ``seed=None`` means lm-eval's own default seeds.

    As in lm-eval, the global generators of random, numpy and torch are seeded, and progress bars
    go to stderr. Settings, tasks, data sets and model configs are checked before any weights are
    read. Raises EvaluationError.
    """
    harness = _import_harness()
    _check_settings(limit, num_fewshot, batch_size, dtype)
    device = _resolve_device(device)
    sources = [model_dir] if against is None else [model_dir, against]
    paths, patterns = zip(*map(_inspect_model, sources), strict=True)
    loaded = load_tasks(tasks, include_path, seed)

    results, dtypes = [], []
    for path in paths:
        prepare_tasks(loaded, num_fewshot, seed)
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints on stdout when it bootstraps
            lm = _load_model(path, device, dtype, batch_size)
            results.append(
                harness.evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)
            )
        dtypes.append(str(lm.model.dtype).removeprefix("torch."))
        del lm
        gc.collect()  # the next model may need all of the memory
        torch.cuda.empty_cache()
    return EvalReport(
        model=str(model_dir),
        pattern=patterns[0],
        dtype=dtypes[0],
        against=None if against is None else str(against),
        against_dtype=None if against is None else dtypes[1],
        device=_describe(device),
        limit=limit,
        num_fewshot=num_fewshot,
        seed=seed,
        versions=_versions(),
        rows=rows_from_results(*results),
    )


def run(
    model_dir: str | Path,
    tasks: str | Sequence[str],
    *,
    output: str | Path | None = None,
    **settings: Any,
) -> EvalReport:
    """What ``samoyeds eval`` does: evaluate, print the table, write ``output`` as JSON.

    ``settings`` are those of :func:`evaluate`, which refuses unknown ones with a TypeError.
    """
    if output is not None and (
        Path(output).is_dir() or not Path(output).absolute().parent.is_dir()
    ):
        raise EvaluationError(
            f"--output must be a file in an existing directory, got {output}: create it first"
        )
    report = evaluate(model_dir, tasks, **settings)
    print(report)
    if output is not None:
        try:
            Path(output).write_text(report.to_json() + "\n", encoding="utf-8")
        except OSError as err:
            raise EvaluationError(f"--output must be writable, got {output}: {err}") from err
    return report


def _import_harness() -> Any:
    """``lm_eval.evaluator``, of a version that is new enough."""
    hint = "pip install 'samoyeds-hf[eval]'"
    try:
        from lm_eval import evaluator
    except ImportError as err:
        raise EvaluationError(
            f"evaluation needs lm-eval >= {_MIN_LM_EVAL}, which cannot be imported ({err}): {hint}"
        ) from err
    found = metadata.version("lm_eval")
    if Version(found) < Version(_MIN_LM_EVAL):
        raise EvaluationError(f"evaluation needs lm-eval >= {_MIN_LM_EVAL}, found {found}: {hint}")
    return evaluator


def _check_settings(limit: Any, num_fewshot: Any, batch_size: Any, dtype: Any) -> None:
    wrong = None
    if limit is not None and not _is_count(limit, at_least=1):
        wrong = f"limit must be a whole number of samples a task, 1 or more, got {limit!r}"
    elif num_fewshot is not None and not _is_count(num_fewshot, at_least=0):
        wrong = f"num_fewshot must be a whole number, 0 or more, got {num_fewshot!r}"
    elif not _is_count(batch_size, at_least=1) and batch_size != "auto":
        wrong = f"batch_size must be a whole number, 1 or more, or 'auto', got {batch_size!r}"
    elif dtype not in _DTYPES:
        wrong = f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}"
    if wrong is not None:
        raise EvaluationError(f"{wrong}: leave it out for the default")


def _is_count(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _resolve_device(name: str | None) -> str:
    """A device that exists: lm-eval replaces a name that it does not know without a word."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            "an evaluation must run in one process, got WORLD_SIZE > 1: under a launcher use the "
            "`lm_eval` command, which loads sparse models too"
        )
    num_gpus = torch.cuda.device_count()
    if name is None:
        return "cuda:0" if num_gpus else "cpu"
    known = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{i}" for i in range(num_gpus))]
    known += ["mps"] if torch.backends.mps.is_available() else []
    if name not in known:
        raise EvaluationError(
            f"device must be one of {', '.join(known)}, got {name!r}: leave it out for the default"
        )
    return name


def _describe(device: str) -> str:
    if torch.device(device).type != "cuda":
        return device
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _inspect_model(source: str | Path) -> tuple[str, str | None]:
    """The absolute path of a model's directory, and the sparsity pattern in its config.

    A Hub id is refused: it cannot be told from a mistyped path without asking the network.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise EvaluationError(
            f"a model must be a directory with config.json and weights, got {source}, which is "
            f"{'not a directory' if path.exists() else 'missing'}: `samoyeds convert` writes a "
            "sparse one, `hf download ID --local-dir DIR` fetches a dense one"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except LOAD_ERRORS as err:
        raise EvaluationError(
            f"a model must be a directory that transformers can open, got {source}: "
            f"{first_line(err)}"
        ) from err
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    is_sparse = quantization.get("quant_method") == "samoyeds"
    return str(path.resolve()), str(quantization["pattern"]) if is_sparse else None


def _load_model(name: str, device: str, dtype: str, batch_size: int | str) -> Any:
    """The harness's HFLM around the model and its tokenizer."""
    from lm_eval.models.huggingface import HFLM

    try:
        with warnings.catch_warnings():
            # HFLM hands the model's own quantization_config on, of which transformers then warns.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            return HFLM(pretrained=name, device=device, dtype=dtype, batch_size=batch_size)
    except SamoyedsError:
        raise
    except LOAD_ERRORS as err:
        raise EvaluationError(
            f"a model must load with its tokenizer as a causal language model, got {name}: "
            f"{first_line(err)}"
        ) from err


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": metadata.version("lm_eval"),
        "samoyeds_hf": __version__,
    }
