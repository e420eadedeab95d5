"""The one error type for mistakes a person can mend: commands print it without a traceback."""


class UserError(Exception):
    """Says in one or two lines what is wrong, where, and what to do about it."""
