"""The error type for mistakes that a user can correct. Commands print it without a traceback."""

import os

# How a run is continued: an option of the command, or another command that passes it on.
TO_RESUME = os.environ.get("STAGEINTERACTOR_TO_RESUME", "--resume")


class UserError(Exception):
    """Its message says in one or two lines what is wrong, where, and what to do about it."""
