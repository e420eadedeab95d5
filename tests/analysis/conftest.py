"""Fixtures of the tests of the analysis room."""

from support.stage_records import record

__all__ = ["record"]
