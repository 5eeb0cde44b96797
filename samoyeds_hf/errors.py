"""Every error a user can cause: one sentence with the requirement, what was found, the way out."""


class SamoyedsError(ValueError):
    """Base of all errors that the package raises for wrong input."""


class PatternError(SamoyedsError):
    """A sparsity pattern that does not exist, or does not fit a weight's shape."""


class FormatError(SamoyedsError):
    """Stored tensors that break the format: wrong shape, dtype, index or metadata."""


class ConfigError(SamoyedsError):
    """A configuration or recipe with an unknown key, a bad value, or a newer format version."""


class UnsupportedModelError(SamoyedsError):
    """A model, or a part of one, that cannot be made sparse; the message says which and why."""


class CheckpointError(SamoyedsError):
    """A checkpoint that is incomplete, damaged, already quantised, or not what was asked for."""


class CalibrationError(SamoyedsError):
    """Calibration data that is missing or cannot be used: wrong shape, too little, not finite."""


class EvaluationError(SamoyedsError):
    """An evaluation that cannot run: unknown task, missing extra, unusable model."""


class KernelError(SamoyedsError, RuntimeError):
    """A kernel library that cannot be used, or a call that it refused; the message is its own."""


class BuildError(KernelError):
    """A kernel library that could not be built; the message names what is missing, or the log."""
