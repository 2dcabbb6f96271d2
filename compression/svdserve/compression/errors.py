"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input: one line that says what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
