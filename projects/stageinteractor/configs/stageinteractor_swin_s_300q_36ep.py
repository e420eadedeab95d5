"""StageInteractor, Swin-S, 300 queries, 36 epochs: 52.7 AP in the paper (table 3).

    python tools/train_net.py --num-gpus 8 \\
        --config-file projects/stageinteractor/configs/stageinteractor_swin_s_300q_36ep.py

16 images a step on 8 GPUs, float32. Not run here; the address of the initial weights was not tried.
"""

from projects.stageinteractor.config.schedule import set_epochs
from projects.stageinteractor.engine.optim import groups_exempt_from_decay

from .models.stageinteractor_swin_s import model
from .stageinteractor_r50_300q_36ep import dataloader, lr_multiplier, optimizer, train

model.query_generator.num_queries = 300
# What the release exempts by name: all norms of the backbone, and those of the decoder that are
# called so there, but not the norms of the heads and of the neck.
optimizer.params._target_ = groups_exempt_from_decay
optimizer.params.exempt = [
    r"\bbackbone\..*(norm|relative_position_bias_table|absolute_pos_embed)",
    r"\bdecoder\..*\.(attention|mixing|ffn)\.norm\.",
]
set_epochs(train, lr_multiplier, 36, milestones=[24, 33], warmup_steps=1000)
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_small_patch4_window7_224.pth"
)
train.output_dir = "./output/stageinteractor_swin_s_300q_36ep"
