"""StageInteractor, ResNet-50, 300 queries, 36 epochs: 48.9 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_300q_36ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from projects.stageinteractor.config.schedule import set_epochs

from .stageinteractor_r50_300q_12ep import dataloader, lr_multiplier, model, optimizer, train

set_epochs(train, lr_multiplier, 36, milestones=[24, 33])
train.output_dir = "./output/stageinteractor_r50_300q_36ep"
