"""Loading a checkpoint of any content the way training does."""

import pickle

import torch

from projects.stageinteractor.checkpoint import SafeCheckpointer


def load_into(model, content, file):
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    checkpointer = SafeCheckpointer(model)
    checkpointer.logger.propagate = True
    incompatible = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda x: incompatible.append(load(x)) or incompatible[-1]
    checkpointer.load(str(file))
    return incompatible[0]
