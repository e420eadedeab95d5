"""AdaMixer, ResNeXt-101-DCN, 300 queries, 36 epochs: no figure in the paper.

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/adamixer_x101_dcn_300q_36ep.py

16 images a step on 8 GPUs, float32. Not run here.
"""

from .models.adamixer_r50 import model as adamixer
from .stageinteractor_x101_dcn_300q_36ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder = adamixer.decoder
model.criterion = adamixer.criterion
train.output_dir = "./output/adamixer_x101_dcn_300q_36ep"
