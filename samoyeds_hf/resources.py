"""Files beside the code: recipes, evaluation tasks, kernel sources, the bundled model."""

from __future__ import annotations

from pathlib import Path

from samoyeds_hf.errors import ConfigError, SamoyedsError

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


def configs_dir() -> Path:
    """``configs/`` of a checkout, or the copy that a wheel carries."""
    bundled = _PACKAGE / "_configs"
    return bundled if bundled.is_dir() else _CHECKOUT / "configs"


def kernels_dir() -> Path:
    """``kernels/`` of a checkout, or the copy that a wheel carries: what libsamoyeds is made of."""
    bundled = _PACKAGE / "_kernels"
    return bundled if bundled.is_dir() else _CHECKOUT / "kernels"


def shipped_library() -> Path:
    """Where a wheel that was built with nvcc has the kernel library; there is none elsewhere."""
    return _PACKAGE / "_lib" / "libsamoyeds.so"


def recipe_path(name: str | Path) -> Path:
    """A recipe file as given, or the bundled recipe of that name ("qwen3-30b-a3b").

    Raises:
        ConfigError: neither exists; names the bundled ones.
    """
    if Path(name).is_file():
        return Path(name)
    bundled = {path.stem: path for path in (configs_dir() / "recipes").glob("*.yaml")}
    if str(name) in bundled:
        return bundled[str(name)]
    raise ConfigError(
        f"A recipe must be a file or one of {sorted(bundled)}, found no {str(name)!r}."
    )


def demo_model() -> Path:
    """The small trained model of the repository.

    Raises:
        SamoyedsError: the package runs outside a checkout, which is what carries the model.
    """
    path = _CHECKOUT / "tests" / "assets" / "tiny-moe"
    if not (path / "config.json").is_file():
        raise SamoyedsError(
            f"The demo needs the model that the repository bundles, found none at {path}; run it "
            "in a clone, or name another dense model with --model."
        )
    return path
