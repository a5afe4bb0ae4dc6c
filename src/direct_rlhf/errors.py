"""The exception tree and the exit codes of the command line.

Every message says what, where, why and what to do. Each class is also its standard-library kind, so code that
catches ``ValueError`` keeps working. Errors pickle: they take one message and no other constructor argument.
"""

from typing import ClassVar

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: interrupted, resumable


class DirectRLHFError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(DirectRLHFError, ValueError):
    """A recipe, a merge file, a command line or a missing extra."""

    exit_code = 2


class DataError(DirectRLHFError, ValueError):
    """Input rows, files, overlaps or fingerprints."""

    exit_code = 3


class CheckpointError(DirectRLHFError, RuntimeError):
    """A checkpoint that is incomplete, damaged, of another version or of another recipe."""


class DivergenceError(DirectRLHFError, ArithmeticError):
    """Non-finite numbers, a KL limit, or a sampler that disagrees with the trainer."""

    exit_code = 5


class JudgeError(DirectRLHFError, RuntimeError):
    """Judge transport, budget, or coverage below the limit."""


class MergeError(DirectRLHFError, ValueError):
    """Models that do not fit together, or a non-finite merge."""


class BackendError(DirectRLHFError, RuntimeError):
    """Engine, kernel, collective or log adapter."""


class OutOfMemoryError(BackendError):
    """Memory ran out at the smallest chunk."""

    exit_code = 4


class Interrupted(DirectRLHFError):
    """A signal asked the run to stop; its state is saved and resumable."""

    exit_code = EXIT_INTERRUPTED
