"""Fixtures that the tests of this room share."""

from support.saved_models import options, shapes  # noqa: F401
