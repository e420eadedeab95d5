"""Learning rates by part of the model."""


class BackboneLRFactor:
    """For ``get_default_optimizer_params``: multiplies the backbone's learning rate.

    Args:
        factor: the multiplier; 1.0 as released.
    """

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, parameter_name: str) -> float:
        return self.factor if "backbone" in parameter_name.split(".") else 1.0
