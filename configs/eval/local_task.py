"""Tasks whose samples are a jsonl file beside the yaml, found from any working directory.

The `json` loader of `datasets` resolves relative paths against the working directory and
writes a cache; this one reads the file into memory and needs neither network nor home directory.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask


class LocalTask(ConfigurableTask):
    """An ordinary yaml task, except that `dataset_kwargs.file` names its jsonl file."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read the samples; the only split is `test`."""
        file = Path(__file__).parent / (dataset_kwargs or {})["file"]
        with file.open(encoding="utf-8") as lines:
            self.dataset = {"test": Dataset.from_list([json.loads(line) for line in lines])}
