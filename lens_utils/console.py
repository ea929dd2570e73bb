"""What a user sees while the lab works: single lines, progress, errors without a traceback."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lens_utils.errors import BadInput, Failure, Unfinished

T = TypeVar("T")

# Errors of the disk and its permissions. Any other OSError is a bug and keeps its traceback.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def say(line: str) -> None:
    """One line to the user, kept apart from what goes to stdout."""
    print(f"lab: {line}", file=sys.stderr, flush=True)


class _Lines:
    """Progress as one line at a time, for logs: a bar drawn over itself would fill them."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip("\r\n"), file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


PLAIN = {"file": _Lines(), "mininterval": 30, "maxinterval": 60, "ascii": True, "ncols": 80}


def track(items: Iterable[T], label: str) -> Iterator[T]:
    """The items, with a progress bar (terminal, notebook) or plain lines (job log)."""
    from tqdm.auto import tqdm

    plain = {} if sys.stderr.isatty() or "ipykernel" in sys.modules else PLAIN
    yield from tqdm(items, desc=label, dynamic_ncols=True, leave=False, **plain)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; what the user can mend becomes one line and an exit code."""
    try:
        command()
        sys.stdout.flush()
    except Unfinished as done:
        say(str(done))
    except BadInput as error:
        say(str(error))
        return 2
    except Failure as error:
        say(str(error))
        return 1
    except BrokenPipeError:  # the reader has seen enough: ./lab list | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK:
            raise
        say(f"{error.strerror}: {error.filename or 'a file'}. What was finished is kept; "
            "mend it and give the same command again.")  # fmt: skip
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        return 130
    return 0
