"""AdaMixer, the baseline, ResNet-50, 100 queries, 12 epochs: 42.7 AP in the paper (table 2).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/adamixer_r50_12ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from .models.adamixer_r50 import model
from .stageinteractor_r50_12ep import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/adamixer_r50_12ep"
