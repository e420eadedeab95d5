"""StageInteractor: query-based object detection with cross-stage interaction (ICCV 2023)."""

__version__ = "0.2.0"
