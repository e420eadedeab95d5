"""AdaMixer on BCCD, trained as the small StageInteractor: see docs/bccd.md.

    python tools/train_net.py \\
        --config-file projects/stageinteractor/configs/adamixer_lite0_bccd.py
"""

from .models.adamixer_lite0 import model
from .stageinteractor_lite0_bccd import dataloader, dataset, lr_multiplier, optimizer, train

model.decoder.num_classes = 3
train.output_dir = "./output/bccd/adamixer"
