"""What tests of calibrated pruning share: a text, a tokenizer of letters, sources that hold it."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_dense
from tiny_models import PATTERN, Family
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.pruning.calibration import Calibration, load_calibration

SAMPLES, LENGTH = 10, 12  # batches of 8 and 2 sequences
SHARD_SIZE = 30_000  # bytes, a quarter of a layer
_LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"  # 96 of them


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter, with ids that every tiny model has."""
    names = ["<pad>", "<s>", "</s>", *_LETTERS]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_text(path: Path, seed: int = 0, letters: int = 400) -> Path:
    """A file of random letters: enough for the samples above."""
    path.write_text("".join(random.Random(seed).choices(_LETTERS, k=letters)), encoding="utf-8")
    return path


def save_source(
    family: Family, directory: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """A family's dense model with the tokenizer beside it."""
    save_dense(family, directory, dtype, **settings)
    letters_tokenizer().save_pretrained(directory)
    return directory


def calibrated(text: Path, method: str = "wanda", **settings: Any) -> SamoyedsConfig:
    """A configuration that looks at a text."""
    data = {"data": str(text), "samples": SAMPLES, "sequence_length": LENGTH}
    return SamoyedsConfig(**{"pattern": PATTERN, "method": method, "calibration": data, **settings})


def tokens_of(text: Path) -> torch.Tensor:
    """The windows ``[SAMPLES, LENGTH]`` that such a configuration reads."""
    calibration = Calibration(str(text), SAMPLES, LENGTH)
    return load_calibration(calibration, letters_tokenizer()).tokens
