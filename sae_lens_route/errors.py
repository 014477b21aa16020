"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """A value, file or setting that cannot be used; the message names it and says what to do.

    The command line prints it as one line. Every other exception is a bug and keeps its traceback.
    """
