"""The tree of errors that a user can meet. Each says what was given, where, what is allowed and what to do.

TowlineError                exit code 2, printed without a traceback
├── ConfigError             the configuration is refused; nothing was loaded or written
├── RunFolderError          the run's folder can't be made, is in use, or holds another run
├── DamagedFileError        a file that Towline wrote can't be read back; it is left as it is
├── CheckpointError         a checkpoint is damaged, or does not fit the run that would resume from it
├── DataError               a file or row can't be used, or too little of the data is left
│   └── LimitError          a text takes more time or memory than any should
├── TokenError              a tokenizer or a new token can't be used as asked
├── ModelError              a model can't be loaded or assembled as asked
├── SweepError              a sweep can't be started or resumed
├── TrackerError            the page of a tracker can't be shown
└── TrainingError           exit code 1: the run itself went wrong
    ├── NonFiniteLossError  the loss became inf or nan; names the rows of the batch
    ├── DiskFullError       no room for a checkpoint; names what it needs and what is free
    └── ExportError         what was written does not load as what was trained

Interrupted                 not an error: the user or the scheduler asked the run to stop (exit code 75)
Pruned                      not an error: the sweep asked the run to end early (exit code 0)
"""

import errno
import logging
import os
import re
import sys
import warnings

from src import secrets
from src.terminal import columns_of, wrapped


class TowlineError(Exception):
    """Base of all errors that are reported as a message instead of a traceback."""

    exit_code = 2


class ConfigError(TowlineError):
    """The configuration is refused."""


class RunFolderError(TowlineError):
    """The run's folder can't be made, is in use by another process, or holds another run."""


class DamagedFileError(TowlineError):
    """A file that Towline wrote can't be read back as it was written; it is left as it is."""


class CheckpointError(TowlineError):
    """A checkpoint is damaged, or does not fit the run that would resume from it."""


class DataError(TowlineError):
    """A file or row can't be used, or too little of the data is left."""


class LimitError(DataError):
    """A text takes more time or memory than any should: by a pattern, or by a chat template."""


class TokenError(TowlineError):
    """A tokenizer or a new token can't be used as asked."""


class ModelError(TowlineError):
    """A model can't be loaded or assembled as asked."""


class SweepError(TowlineError):
    """A sweep can't be started or resumed."""


class TrackerError(TowlineError):
    """The page of a tracker can't be shown."""


class TrainingError(TowlineError):
    """The run itself went wrong, after it had started well."""

    exit_code = 1


class NonFiniteLossError(TrainingError):
    """The loss became inf or nan."""


class DiskFullError(TrainingError):
    """There is no room for a checkpoint."""


class ExportError(TrainingError):
    """What was written does not load as what was trained."""


class Interrupted(BaseException):
    """The run was asked to stop (by a signal, or because its time is up) and came to a point where it could.

    No Exception, as KeyboardInterrupt is none: whoever catches what a library may raise must not catch this.
    """

    exit_code = 75  # EX_TEMPFAIL: a scheduler may queue the same command again


class Pruned(BaseException):
    """The sweep that a run belongs to has it end early: others look better at the same evaluation."""

    exit_code = 0


def is_disk_full(error: BaseException | str) -> bool:
    """Return whether there was no room for what was written, by an error's number or, of some libraries, its text."""
    texts = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), DiskFullError.__name__)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in texts)


def one_line(error: BaseException, most: int = 300) -> str:
    """Return a library's error as one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but for tab and line end: C0, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of direction
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and halves of characters that no terminal is sent
)


def visible(text: str, *, is_line: bool = False) -> str:
    r"""Return a text as it may be shown: without secrets, and with its control characters written out, as \x1b.

    So no terminal obeys them. Line ends and tabs stay, unless it is to be one line.
    """
    seen = _UNSEEN.sub(_written_out, secrets.clean(text))
    return seen.replace("\n", "\\n").replace("\t", "\\t") if is_line else seen


def _written_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _VisibleRecord(logging.LogRecord):
    """What a library logs, as it may be shown."""

    def getMessage(self) -> str:  # noqa: N802
        return visible(super().getMessage())


def show_libraries_visibly() -> None:
    """Show what libraries log or warn of as `visible` does: they quote texts of checkpoints and data."""
    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"{filename}:{lineno}: {category.__name__}: {visible(str(message))}\n"
    )


def report(message: object, *, wraps: bool = True) -> None:
    """Print a message to the error stream, its control characters written out; `wraps`: its lines fit a terminal."""
    text = visible(str(message))
    print(wrapped(text, columns_of(sys.stderr)) if wraps else text, file=sys.stderr, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Print what was asked for."""
    print(text, end=end, flush=True)
