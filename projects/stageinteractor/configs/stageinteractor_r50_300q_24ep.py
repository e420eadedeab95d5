"""StageInteractor, ResNet-50, 300 queries, 24 epochs: 48.3 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r50_300q_24ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from projects.stageinteractor.config.schedule import set_epochs

from .stageinteractor_r50_300q_12ep import dataloader, lr_multiplier, model, optimizer, train

set_epochs(train, lr_multiplier, 24, milestones=[16, 22])
train.output_dir = "./output/stageinteractor_r50_300q_24ep"
