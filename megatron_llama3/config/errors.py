"""The one exception that means: what the user asked for cannot be done, and here is the line that says why."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in flags, files or data. Its message is one line naming the flag or file, the value, and what to do."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Runs a tool's `main`; a UserError becomes `error: ...` on stderr (a line each, if it names several) and exit status 2, and so does
    a file or folder that the system refuses."""
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:  # nothing that the user named
            raise
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
