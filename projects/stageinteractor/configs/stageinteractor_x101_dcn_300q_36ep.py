"""StageInteractor, ResNeXt-101-DCN, 300 queries, 36 epochs: 51.3 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_x101_dcn_300q_36ep.py

16 images a step on 8 GPUs, float32. Not run here; the address of the initial weights was not tried.
"""

from .models.stageinteractor_x101_dcn import model
from .stageinteractor_r50_300q_36ep import dataloader, lr_multiplier, optimizer, train

model.query_generator.num_queries = 300
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
)
train.output_dir = "./output/stageinteractor_x101_dcn_300q_36ep"
