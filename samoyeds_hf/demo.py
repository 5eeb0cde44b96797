"""The main job on a small trained model: convert, load in a fresh process, generate, compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.convert import DEFAULT_SHARD_SIZE, convert_checkpoint
from samoyeds_hf.errors import SamoyedsError
from samoyeds_hf.hub import resolve_source
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.report import format_bytes, format_table
from samoyeds_hf.resources import demo_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPTS = ("def __init__(self", "import os\n")
_NEW_TOKENS = 40
METHOD = "best"
SAMPLES = 64  # sequences of calibration ...
_LENGTH = 512  # ... of so many tokens

# What a user's program does: nothing of this package is imported before the model is loaded.
_FRESH_PROCESS = """\
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
from samoyeds_hf.demo import measure
measure(model, tokenizer, int(sys.argv[2]))
"""


def run_demo(
    pattern: str,
    model: Path | None = None,
    *,
    max_tokens: int = 20_000,
    method: str = METHOD,
    samples: int = SAMPLES,
) -> None:
    """Print perplexity, size and a few generated lines: dense, 2:4, and ``pattern``.

    Pruned by ``method`` on ``samples`` sequences of Python code, with neurons reordered. Perplexity
    is on files of the standard library that the model was not trained on, see
    :func:`samoyeds_hf.corpus.python_files`.

    Raises:
        SamoyedsError: no model, a pattern that does not fit, or a process that fails.
    """
    dense = demo_model() if model is None else resolve_source(model)
    patterns = dict.fromkeys(("2:4", str(SparsityPattern.parse(pattern))))
    configs = {name: demo_config(name, method, samples) for name in patterns}
    for config in configs.values():  # what does not fit is said before minutes of work
        plan_conversion(dense, config, DEFAULT_SHARD_SIZE)
    with tempfile.TemporaryDirectory(prefix="samoyeds-demo-") as folder:
        directories = {"dense": dense}
        for name, config in configs.items():
            directories[name] = Path(folder) / name.replace(":", "-")
            start = time.perf_counter()
            convert_checkpoint(dense, directories[name], config, progress=False)
            print(f"converted to {name} in {time.perf_counter() - start:.1f} s")
        results = {}
        for name, directory in directories.items():
            print(f"loading {name} in a fresh process")
            results[name] = _in_fresh_process(directory, max_tokens)
        sizes = {name: _weight_bytes(directory) for name, directory in directories.items()}
    for prompt_index, prompt in enumerate(_PROMPTS):
        for name, result in results.items():
            print(f"\n--- {name} continues {prompt!r}")
            print(result["samples"][prompt_index])
    print()
    print(_table(results, sizes))


def demo_config(pattern: str, method: str = METHOD, samples: int = SAMPLES) -> SamoyedsConfig:
    """How the demo prunes: calibrated on files that perplexity is not measured on."""
    if method == "magnitude":
        return SamoyedsConfig(pattern)
    calibration = {"data": "python-stdlib", "samples": samples, "sequence_length": _LENGTH}
    return SamoyedsConfig(pattern, method, permute=True, calibration=calibration)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """Print perplexity and samples of a loaded model as one line of JSON."""
    from samoyeds_hf.corpus import perplexity, python_files, read_texts
    from samoyeds_hf.experts import SparseModule

    samples = []
    for prompt in _PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        # Greedy, so that two runs agree; the penalty keeps a small model from repeating a line.
        tokens = model.generate(
            **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, repetition_penalty=1.15
        )
        samples.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    texts = read_texts(python_files("heldout"))
    value = perplexity(model, tokenizer, texts, max_tokens=max_tokens)
    sparse = [type(m).__name__ for m in model.modules() if isinstance(m, SparseModule)]
    print(json.dumps({"perplexity": value, "samples": samples, "sparse_modules": len(sparse)}))


def _in_fresh_process(directory: Path, max_tokens: int) -> dict[str, Any]:
    """Load a checkpoint as a user would, and measure it."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, str(directory), str(max_tokens)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if process.returncode:
        found = _last_line(process.stderr) or f"exit code {process.returncode}"
        raise SamoyedsError(
            f"{directory} must load in a fresh process and continue a text, found {found}; "
            "see 'samoyeds env'."
        )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _last_line(text: str) -> str:
    """What a traceback ends with: the error."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "").rstrip(".")


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _table(results: dict[str, dict[str, Any]], sizes: dict[str, int]) -> str:
    rows = [
        (
            name,
            format_bytes(sizes[name]),
            f"{sizes[name] / sizes['dense']:.2f}",
            str(result["sparse_modules"]),
            f"{result['perplexity']:.2f}",
        )
        for name, result in results.items()
    ]
    head = ("model", "weights on disk", "ratio", "sparse layers", "held-out perplexity")
    return format_table(head, rows)
