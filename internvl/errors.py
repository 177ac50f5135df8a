"""What a user can mend, told in one line."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable

# the disk's and the folder's faults, not ours
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR),
}


class UserError(ValueError):
    """Something the user can mend; a command prints it as one line and exits with its code, 2."""

    exit_code = 2


class DataError(UserError):
    """A row, an image or a file that cannot be used; the message names it and the reason."""


def cli_guard(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit code 2.

    So does a file that cannot be read or written for want of rights or room.
    Every other exception keeps its traceback: it is a defect of ours, not of the input.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # `| head` has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _in_one_line(error: UserError) -> str:
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker " in text:
        # torch puts the worker's traceback in front of what it was told
        text = text.rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2]
    return " ".join(text.splitlines())
