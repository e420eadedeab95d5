"""Training on Detectron2's engine: what ``tools/train_net.py`` adds to it."""
