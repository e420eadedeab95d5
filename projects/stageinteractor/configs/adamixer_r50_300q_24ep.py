"""AdaMixer, the baseline, ResNet-50, 300 queries, 24 epochs: 46.7 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/adamixer_r50_300q_24ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from .models.adamixer_r50 import model
from .stageinteractor_r50_300q_24ep import dataloader, lr_multiplier, optimizer, train

model.query_generator.num_queries = 300
train.output_dir = "./output/adamixer_r50_300q_24ep"
