"""The tokenizer of checkpoints whose tokenizer_config.json names the wrong class."""

from typing import Any


def declared_bos_tokenizer(backend: type) -> type:
    """Build the loader of a byte-level tokenizer.json, given transformers' `TokenizersBackend`.

    With a tokenizer.json present, transformers 5 ignores `add_bos_token` of tokenizer_config.json.
    The class that the Hub names used to honour it, and the models were trained with that token.
    """
    base: Any = backend

    class DeclaredBosTokenizer(base):
        @classmethod
        def from_pretrained(cls, path: Any, *inputs: Any, **kwargs: Any) -> Any:
            from transformers.models.auto.tokenization_auto import get_tokenizer_config

            declared = get_tokenizer_config(path, **kwargs)
            for key in ("add_bos_token", "add_eos_token"):
                if declared.get(key):
                    kwargs.setdefault(key, True)
            # The plain class: what it saves, with the token in tokenizer.json, opens anywhere.
            return base.from_pretrained(path, *inputs, **kwargs)

    return DeclaredBosTokenizer
