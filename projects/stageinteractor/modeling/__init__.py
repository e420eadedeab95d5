"""The model, with one file per idea; ``stageinteractor.py`` shows how the parts fit together."""

from .criterion import SetCriterion
from .decoder import StageInteractorDecoder
from .label_assigner import CrossStageLabelAssigner
from .matcher import HungarianMatcher
from .neck import SharedNormChannelMapper
from .queries import QueryGenerator
from .stageinteractor import StageInteractor

__all__ = [
    "CrossStageLabelAssigner",
    "HungarianMatcher",
    "QueryGenerator",
    "SetCriterion",
    "SharedNormChannelMapper",
    "StageInteractor",
    "StageInteractorDecoder",
]
