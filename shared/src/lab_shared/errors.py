"""The error a command shows as one line: something the user gave or the machine lacks, with the way out named."""


class UserError(ValueError):
    """Base of every error a user can cause; commands print it without a traceback and exit with 1."""
