"""What ``tools/train_net.py`` needs beside model, data, optimizer and schedule.

The fields that detrex has carry its names and meaning.
"""

train = {
    "output_dir": "./output",
    "init_checkpoint": "",  # a file, a URL or detectron2://...
    "max_iter": 90000,  # optimizer steps
    # With epochs, max_iter is for COCO at 16 images a step, as are periods of whole epochs (7330):
    # train_net.py recomputes them for the data and batch size at hand, and keeps warmup_steps.
    "epochs": None,
    "warmup_steps": None,  # None: lr_multiplier.warmup_length, a share of the run
    # Multiplies optimizer.lr by images a step / batch_size.
    "scale_lr": {"enabled": False, "batch_size": 16},
    "device": "auto",  # auto takes cuda, else mps, else cpu
    "seed": -1,  # -1 draws one
    # Mixed precision of the forward pass; losses are always float32. bfloat16 or float16.
    "amp": {"enabled": False, "dtype": "bfloat16"},
    "compile": {"enabled": False},  # the decoder's stages, by torch.compile
    "accumulation_steps": 1,  # batches of dataloader.train.total_batch_size images a step
    "accept_changes": False,  # resume although classes, images or boxes have changed
    "max_skipped_steps": 10,  # in a row, with a loss or gradient that is not finite
    "clip_grad": {"enabled": False, "params": {"max_norm": 0.1, "norm_type": 2}},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "fast_dev_run": {"enabled": False},  # a few iterations of everything, to find mistakes early
    "log_period": 20,
    "eval_period": 5000,
    "checkpointer": {"period": 5000, "max_to_keep": 3},
    "best_checkpointer": {"val_metric": "bbox/AP", "mode": "max"},  # kept as model_best.pth
    "model_ema": {"enabled": False, "decay": 0.9999},  # evaluates the moving average of the weights
    # Needs the wandb package; params go to wandb.init.
    "wandb": {"enabled": False, "params": {"project": "stageinteractor", "name": None, "dir": None}},
}
