"""StageInteractor, ResNet-101, 300 queries, 36 epochs: 49.9 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_r101_300q_36ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from .models.stageinteractor_r101 import model
from .stageinteractor_r50_300q_36ep import dataloader, lr_multiplier, optimizer, train

model.query_generator.num_queries = 300
# Detectron2's model zoo has no ResNet-101 of this kind, but torchvision's own file loads too.
train.init_checkpoint = "https://download.pytorch.org/models/resnet101-63fe2227.pth"
train.output_dir = "./output/stageinteractor_r101_300q_36ep"
