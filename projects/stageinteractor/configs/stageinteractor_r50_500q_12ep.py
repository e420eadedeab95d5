"""StageInteractor, ResNet-50, 500 queries, 12 epochs: 46.9 AP in the paper (table 2).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_500q_12ep.py

16 images a step on 8 GPUs, float32. The recipe of this row was not released: this is the one with
100 queries. Not run here.
"""

from .stageinteractor_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

model.query_generator.num_queries = 500
train.output_dir = "./output/stageinteractor_r50_500q_12ep"
