"""StageInteractor, ResNet-50, 900 queries, 36 epochs: 50.8 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_900q_36ep.py

16 images a step on 8 GPUs, float32. The paper takes more sampling points here, but does not say how
many: this config doubles them. Not run here.
"""

from .stageinteractor_r50_300q_36ep import dataloader, lr_multiplier, model, optimizer, train

model.query_generator.num_queries = 900
model.decoder.points_per_stage = [128, 64, 64, 64, 64, 64]
train.output_dir = "./output/stageinteractor_r50_900q_36ep"
