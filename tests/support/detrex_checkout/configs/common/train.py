"""The fields of detrex's ``train`` and their defaults."""

train = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "clip_grad": {"enabled": False, "params": {"max_norm": 0.1, "norm_type": 2}},
    "seed": -1,
    "fast_dev_run": {"enabled": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "wandb": {
        "enabled": False,
        "params": {"dir": "./wandb_output", "project": "detrex", "name": "detrex_experiment"},
    },
    "model_ema": {
        "enabled": False, "decay": 0.999, "device": "", "use_ema_weights_for_eval_only": False,
    },
    "device": "cuda",
}
