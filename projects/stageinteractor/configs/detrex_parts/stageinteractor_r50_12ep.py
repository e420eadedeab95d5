"""StageInteractor with detrex's own attention and feed-forward network, to be trained in detrex.

    python tools/train_net.py --num-gpus 8 --config-file \\
        projects/stageinteractor/configs/detrex_parts/stageinteractor_r50_12ep.py

It computes what ``stageinteractor_r50_12ep`` computes, and shows how to put other parts in.
"""

from projects.stageinteractor.plugins.detrex_parts import MultiheadIoFAttention, NormalizedFFN

from ..stageinteractor_r50_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.update(attention=MultiheadIoFAttention, ffn=NormalizedFFN)
train.output_dir = "./output/stageinteractor_r50_12ep_detrex_parts"
