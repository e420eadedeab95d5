"""Training on Detectron2's engine: the parts of ``tools/train_net.py``."""
