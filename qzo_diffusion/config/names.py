"""Guess the setting that a user means who knows other trainers or mistypes."""

import difflib
from collections.abc import Collection

# our setting -> names that other trainers have for it
ELSEWHERE = {
    "train.lr": "lr learning_rate base_lr unet_lr transformer_lr",
    "train.max_steps": (
        "steps step max_train_steps num_train_steps train_steps num_steps total_steps iterations "
        "num_iterations max_iterations iters"
    ),
    "train.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "train.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_ratio",
    "train.optimizer": "optimizer_type optim",
    "train.seed": "seed random_seed",
    "train.micro_batch_size": "micro_batch gradient_accumulation_steps gradient_accumulation",
    "train.checkpoint_every": (
        "checkpointing_steps save_steps save_every save_every_n_steps checkpoint_interval"
    ),
    "train.keep_checkpoints": "checkpoints_total_limit save_total_limit max_step_saves_to_keep",
    "train.patience": "early_stopping_patience early_stopping early_stop",
    "train.max_minutes": "max_time max_train_time time_limit max_hours",
    "train.validate_every": "validation_steps eval_steps eval_every eval_interval",
    "qzo.eps": "epsilon zo_eps mu perturbation_scale",
    "qzo.num_directions": "num_perturbations num_samples_zo num_queries num_probes",
    "qzo.clip_threshold": "max_grad_norm clip_grad_norm gradient_clipping grad_clip",
    "qzo.layers": "target_modules lora_target_modules train_layers only_if_contains",
    "quant.type": "bits load_in_4bit load_in_8bit quantization quantize bnb_4bit_quant_type qtype",
    "quant.blocksize": "group_size block_size",
    "compute.dtype": (
        "mixed_precision precision torch_dtype weight_dtype save_precision fp16 bf16 amp"
    ),
    "compute.device": "gpu cuda device_map",
    "model": (
        "pretrained_model_name_or_path pretrained_model model_name model_name_or_path model_id "
        "base_model model_path name_or_path checkpoint"
    ),
    "data.batch_size": "batch_size train_batch_size per_device_train_batch_size batch",
    "data.resolution": "image_size size height width resolutions",
    "data.style_dir": (
        "instance_data_dir train_data_dir data_dir dataset_dir dataset image_dir image_folder "
        "folder_path images dataset_path"
    ),
    "data.validation_dir": "val_data_dir eval_data_dir validation_data_dir",
    "data.caption": "instance_prompt default_caption",
    "data.trigger": "trigger_word placeholder_token instance_token token concept",
    "data.caption_dropout": "caption_dropout_rate proportion_empty_prompts cond_dropout",
    "data.flip": "random_flip flip_aug horizontal_flip",
    "data.masks": "masked_training masked_loss alpha_mask mask_path conditioning_data_dir",
    "data.repeats": "num_repeats dataset_repeats",
    "prior.weight": "prior_loss_weight with_prior_preservation prior_preservation",
    "prior.prompts": "class_prompt class_prompts",
    "prior.dir": "class_data_dir reg_data_dir reg_dir regularization_dir",
    "data.dir": "data_dir dataset_dir dataset_path",
    "data.train_file": "train_data train_path",
    "data.test_file": "validation_file eval_file test_path",
    "data.max_tokens": "max_seq_length max_seq_len max_length cutoff_len model_max_length",
    "sample.prompts": (
        "prompt prompts validation_prompt validation_prompts sample_prompts prompts_file"
    ),
    "sample.guidance": "guidance_scale cfg cfg_scale classifier_free_guidance_scale",
    "sample.steps": "num_inference_steps sample_steps inference_steps",
    "sample.negative_prompt": "negative neg",
    "sample.every": "sample_every_n_steps sample_every sample_interval",
    "text.t5_tokens": "max_sequence_length max_token_length",
    "sigma.distribution": "weighting_scheme timestep_sampling timestep_type",
    "sigma.shift": "discrete_flow_shift flow_shift timestep_shift",
    "sigma.min": "min_timestep timestep_min min_sigma min_denoising_steps",
    "sigma.max": "max_timestep timestep_max max_sigma max_denoising_steps",
    "sigma.min_snr": "min_snr_gamma snr_gamma",
    "lora.rank": "rank r network_dim lora_rank lora_r lora_dim",
    "lora.alpha": "alpha network_alpha lora_alpha",
    "task": "task_name dataset_name",
}
_EPOCHS = (
    "a run is counted in steps: train.max_steps is the number of epochs times the examples, over "
    "data.batch_size"
)
_ADAPTERS = "no adapter is trained: the scales themselves are, so nothing has a rank; leave it out"
_NO_GRADIENT = "nothing is trained by a backward pass that would need it; leave it out"
# names of other trainers for what is no setting here
SENTENCES = {
    "epochs num_train_epochs num_epochs max_train_epochs validation_epochs": _EPOCHS,
    "rank r network_dim lora_rank lora_r lora_dim alpha network_alpha lora_alpha network_module "
    "linear linear_alpha": _ADAPTERS,
    "gradient_checkpointing adam_beta1 adam_beta2 weight_decay adam_weight_decay "
    "use_8bit_adam": _NO_GRADIENT,
    "output_dir out_dir save_dir logging_dir output": (
        "the folder of a run is a flag: --output-dir DIR"
    ),
    "resume resume_from_checkpoint": "going on with a run is a flag: --resume RUN",
    "cache_latents cache_latents_to_disk cache_text_embeddings": (
        "encoded images and prompts are always kept; data.cache_dir says where"
    ),
    "num_class_images": "one picture is drawn for each line of prior.prompts; leave it out",
    "report_to log_with wandb": "TensorBoard's files are always written; leave it out",
}


def suggestion(key: str, known: Collection[str]) -> str:
    """Return a sentence that says how to replace the unknown setting `key`."""
    tail = key.rpartition(".")[2].replace("-", "_").lower()
    for setting, names in ELSEWHERE.items():
        if setting in known and tail in names.split():
            return f"did you mean {setting!r}?"
    for named, sentence in SENTENCES.items():
        if tail in named.split():
            return sentence
    guess = _same_tail(tail, known) or _close(key, tail, known)
    if guess is not None:
        return f"did you mean {guess!r}?"
    return (
        "`qzo-diffuse settings` lists all settings, `qzo-diffuse train --help` those that are flags"
    )


def _same_tail(tail: str, known: Collection[str]) -> str | None:
    return next((key for key in known if key.rpartition(".")[2] == tail), None)


def _close(key: str, tail: str, known: Collection[str]) -> str | None:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    tails = difflib.get_close_matches(
        tail, [one.rpartition(".")[2] for one in known], n=1, cutoff=0.7
    )
    return close[0] if close else _same_tail(tails[0], known) if tails else None
