"""How the command lines end: exit statuses and error messages."""

import sys
from collections.abc import Callable
from typing import NoReturn


class Mistake(Exception):
    """An error that the user can fix. The message is a sentence that says how."""


def end_with(command: Callable[[], int | None], stopped: str) -> NoReturn:
    """Run a command and exit with its status: 2 and one sentence for a mistake, 130 for Ctrl-C.

    Args:
        command: Returns the exit status; None means 0.
        stopped: The message after Ctrl-C.
    """
    try:
        code = command()
    except Mistake as error:
        print(error, file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 0
    except OSError as error:
        words = f"{error.filename or 'A file'} cannot be used ({error.strerror or error})"
        print(f"{words}: fix that and run again.", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
