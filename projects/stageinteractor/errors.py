"""The one error type for mistakes a person can mend: commands print it without a traceback."""

import os

# How a person continues a run: the option of the command, or another command that gives it.
TO_RESUME = os.environ.get("STAGEINTERACTOR_TO_RESUME", "--resume")


class UserError(Exception):
    """Says in one or two lines what is wrong, where, and what to do about it."""
