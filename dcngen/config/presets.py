"""Sizes to start from without a configuration file; they fill only what file and command line leave open."""

# CUDA graphs: at these sizes the host's launches would set the pace.
COMPILED = {"compile": True, "compile_mode": "reduce-overhead"}

PRESETS: dict[str, dict] = {
    # Small pictures on a CPU, in minutes.
    "tiny": {
        "data": {"image_size": 32},
        "autoencoder": {"block_out_channels": [16, 32, 32], "max_train_steps": 600, "train_batch_size": 32},
        "model": {
            "block_out_channels": [48, 96],
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "dcn_group_channels": 16,
        },
        "train": {"train_batch_size": 64, "max_train_steps": 1000},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 50},
        "ema": {"decay": 0.995},
    },
    # 32 to 64 pixels on one GPU, in minutes to an hour.
    "small": {
        "data": {"image_size": 32, "horizontal_flip": True},
        "autoencoder": {"block_out_channels": [64, 128], "layers_per_block": 2, "max_train_steps": 6000},
        "model": {"block_out_channels": [128, 256, 256], "layers_per_block": 2},
        "train": {"train_batch_size": 512, "max_train_steps": 20_000, "mixed_precision": "bf16"} | COMPILED,
        "optimizer": {"learning_rate": 4e-4},
        "ema": {"decay": 0.9995},
    },
    # 256 pixels in the latents of Stable Diffusion's autoencoder.
    "base": {
        "data": {"image_size": 256, "horizontal_flip": True},
        "autoencoder": {"pretrained": "stabilityai/sd-vae-ft-mse"},
        "model": {"block_out_channels": [128, 256, 384, 512], "layers_per_block": 2},
        "train": {"train_batch_size": 128, "max_train_steps": 200_000, "mixed_precision": "bf16"} | COMPILED,
        "checkpoint": {"checkpointing_steps": 10_000},
        "sampling": {"sample_steps": 10_000},
    },
}
