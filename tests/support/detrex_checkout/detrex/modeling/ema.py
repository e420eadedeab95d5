"""Moving averages as detrex keeps them: of everything in the model, in a table by name."""

import contextlib
import itertools

import torch
from detectron2.engine import HookBase


def tensors_of(model):
    """Parameters and buffers, those that are not saved too."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


class EMAState:
    """The averages; a checkpointable."""

    def __init__(self):
        self.state = {}

    def save_from(self, model, device):
        for name, value in tensors_of(model).items():
            value = value.detach().clone()
            self.state[name] = value.to(device) if device else value

    @torch.no_grad()
    def apply_to(self, model):
        for name, value in tensors_of(model).items():
            value.copy_(self.state[name])

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


def may_build_model_ema(cfg, model):
    if cfg.train.model_ema.enabled:
        assert not hasattr(model, "ema_state")
        model.ema_state = EMAState()


def may_get_ema_checkpointer(cfg, model):
    return {"ema_state": model.ema_state} if cfg.train.model_ema.enabled else {}


def apply_model_ema(model):
    model.ema_state.apply_to(model)


@contextlib.contextmanager
def apply_model_ema_and_restore(model):
    trained = EMAState()
    trained.save_from(model, device="")
    apply_model_ema(model)
    yield
    trained.apply_to(model)


class EMAHook(HookBase):
    """Updates the averages after every step."""

    def __init__(self, cfg, model):
        self.model, self.ema = model, model.ema_state
        self.decay = cfg.train.model_ema.decay
        self.device = cfg.train.model_ema.device or cfg.model.device

    def before_train(self):
        if self.ema.state:
            self.ema.state = {name: v.to(self.device) for name, v in self.ema.state.items()}
        else:
            self.ema.save_from(self.model, self.device)

    @torch.no_grad()
    def after_step(self):
        for name, value in tensors_of(self.model).items():
            average = self.ema.state[name]
            average.copy_(average * self.decay + value.to(self.device) * (1 - self.decay))
