"""What ``tools/train_net.py`` needs besides model, data, optimizer and schedule.

Fields that detrex also has keep its names and meaning.
"""

train = {
    "output_dir": "./output",
    "init_checkpoint": "",  # a file, a URL or detectron2://...
    "max_iter": 90000,  # optimizer steps
    # With epochs, max_iter counts COCO's iterations at 16 images a step, and so do periods of whole
    # epochs (7330): train_net.py recomputes them for the actual data and batch size.
    "epochs": None,
    "warmup_steps": None,  # None uses lr_multiplier.warmup_length, a share of the run
    # Multiplies optimizer.lr by images a step / batch_size.
    "scale_lr": {"enabled": False, "batch_size": 16},
    "trust_program": False,  # a .pt2 that is evaluated is your own: loading one can run code in it
    "device": "auto",  # auto: the first of cuda, mps and cpu that is available
    "seed": -1,  # -1 draws a seed
    # Mixed precision of the forward pass; losses are always float32. bfloat16 or float16.
    "amp": {"enabled": False, "dtype": "bfloat16"},
    "compile": {"enabled": False},  # the decoder's stages, by torch.compile
    "accumulation_steps": 1,  # batches of dataloader.train.total_batch_size images a step
    "accept_changes": False,  # resume even if classes, images or boxes have changed
    "max_skipped_steps": 10,  # training fails after so many consecutive non-finite steps
    "clip_grad": {"enabled": False, "params": {"max_norm": 0.1, "norm_type": 2}},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "fast_dev_run": {"enabled": False},  # a few iterations of everything, to find mistakes early
    "log_period": 20,
    "eval_period": 5000,
    "checkpointer": {"period": 5000, "max_to_keep": 3},
    "best_checkpointer": {"val_metric": "bbox/AP", "mode": "max"},  # saved as model_best.pth
    "model_ema": {"enabled": False, "decay": 0.9999},  # evaluates the moving average of the weights
    # Needs the wandb package; params go to wandb.init.
    "wandb": {
        "enabled": False,
        "params": {"project": "stageinteractor", "name": None, "dir": None},
    },
}
