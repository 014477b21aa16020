"""The one exception that means: the user can fix this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A value, file or setting that cannot be used; the message names it and says what to do.

    The command line prints it as one line. Every other exception is a bug and keeps its traceback.
    """


@contextmanager
def reading_errors(where: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what is raised on a file that cannot be read into a UserError.

    Args:
        where: Names the file: the beginning of the message.
        more: Exceptions of the file's reader that are no OSError, ValueError or LookupError.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, *more) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {reason})") from error
