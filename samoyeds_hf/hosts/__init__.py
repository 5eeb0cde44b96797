"""Model types that transformers does not know, run by classes of this package built on its own.

A `Host` names those classes by dotted path. Registering a host imports none of them: transformers
loads a class when it first asks for it, so a host costs nothing until such a checkpoint is opened.
`samoyeds_hf.autoload` says when each `register_*` is called; to call one again changes nothing.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from samoyeds_hf.hosts.tokenizer import declared_bos_tokenizer

_LOG = logging.getLogger(__name__)
_AUTO = "transformers.models.auto"


@dataclass(frozen=True)
class Host:
    """One model type and, by dotted path, the classes that run it."""

    model_type: str  # as in the Hub's config.json
    config: str  # configuration class
    models: Mapping[str, str]  # auto class -> model class
    # The Hub names LlamaTokenizerFast for a byte-level tokenizer.json; version 5 of transformers
    # then splits text as SentencePiece does and loses every space.
    byte_level_tokenizer: bool = False


HOSTS: tuple[Host, ...] = (
    Host(
        "deepseek",
        config="samoyeds_hf.hosts.deepseek_config.DeepseekConfig",
        models={
            "AutoModel": "samoyeds_hf.hosts.deepseek.DeepseekModel",
            "AutoModelForCausalLM": "samoyeds_hf.hosts.deepseek.DeepseekForCausalLM",
        },
        byte_level_tokenizer=True,
    ),
)


class _LazyClasses(dict[Any, Any]):
    """The classes registered with one auto mapping; a pending one is imported when looked up."""

    def __init__(self, registered: Mapping[Any, Any]) -> None:
        super().__init__(registered)
        self.pending: dict[str, str] = {}  # model type or path of a config class -> path

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _name(key) in self.pending

    def __missing__(self, key: object) -> type:
        path = self.pending.get(_name(key))
        if path is None:
            raise KeyError(key)
        module, _, name = path.rpartition(".")
        self[key] = value = getattr(import_module(module), name)
        return value  # type: ignore[no-any-return]


def register_configs() -> None:
    """Make `AutoConfig` know every host; a type that transformers itself has is left alone.

    Cheap and safe right after `configuration_auto` ran, with transformers still half imported.
    """
    auto = import_module(f"{_AUTO}.configuration_auto")
    for host in HOSTS:
        if host.model_type not in auto.CONFIG_MAPPING:
            _add(auto.CONFIG_MAPPING, host.model_type, host.config)


def register_models() -> None:
    """Make the auto model classes know every host's configuration class, after `modeling_auto`."""
    auto = import_module(f"{_AUTO}.modeling_auto")
    for host in HOSTS:
        for auto_class, model in host.models.items():
            _add(getattr(auto, auto_class)._model_mapping, host.config, model)


def register_tokenizers() -> None:
    """Make `AutoTokenizer` read byte-level tokenizers as such, after `tokenization_auto`."""
    auto = import_module(f"{_AUTO}.tokenization_auto")
    if auto.TokenizersBackend is None:  # the tokenizers package is missing
        return
    for host in HOSTS:
        if host.byte_level_tokenizer and host.model_type not in auto.TOKENIZER_MAPPING_NAMES:
            tokenizer = declared_bos_tokenizer(auto.TokenizersBackend)
            auto.REGISTERED_TOKENIZER_CLASSES.setdefault(tokenizer.__name__, tokenizer)
            auto.TOKENIZER_MAPPING_NAMES[host.model_type] = tokenizer.__name__
            auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(host.model_type)


def _add(mapping: Any, key: str, path: str) -> None:
    """Add a class that is not imported yet to a transformers auto mapping."""
    registered = getattr(mapping, "_extra_content", None)
    if not isinstance(registered, dict):
        # Runs inside `import transformers`: to raise would take down programs that need no host.
        _LOG.warning("cannot register %s: this transformers keeps its auto classes elsewhere", path)
        return
    if not isinstance(registered, _LazyClasses):
        registered = mapping._extra_content = _LazyClasses(registered)
    registered.pending.setdefault(key, path)


def _name(key: object) -> str:
    if isinstance(key, str):
        return key
    return f"{getattr(key, '__module__', '')}.{getattr(key, '__qualname__', '')}"
