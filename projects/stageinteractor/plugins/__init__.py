"""Parts of the method for other detectors."""

from .cross_stage_criterion import CrossStageCriterion

__all__ = ["CrossStageCriterion"]
