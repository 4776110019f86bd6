"""Finds the field of a configuration that an unknown name stands for."""

import difflib
from collections.abc import Mapping

ELSEWHERE: Mapping[str, str] = {
    "lr": "schedule.learning_rate",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temp": "temperature",
    "lr_scheduler": "schedule.shape",
    "lr_scheduler_type": "schedule.shape",
    "num_epochs": "schedule.epochs",
    "num_train_epochs": "schedule.epochs",
    "max_steps": "schedule.steps",
    "warmup_ratio": "schedule.warmup_steps",
    "train_batch_size": "schedule.batch_size",
    "micro_batch_size": "schedule.batch_size",
    "per_device_train_batch_size": "schedule.batch_size",
    "gradient_accumulation_steps": "schedule.accumulation_steps",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "gradient_checkpointing": "model.remat",
    "dataset": "data.path",
    "datasets": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "train_file": "data.path",
    "dataset_config": "data.name",
    "dataset_config_name": "data.name",
    "dataset_train_split": "data.split",
    "dataset_text_field": "data.text_field",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "output_dir": "output",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "peft_layers_to_transform": "lora.layers",
    "layers_to_transform": "lora.layers",
    "init_lora_weights": "lora.init",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "max_gradient_norm": "optimizer.max_grad_norm",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optim": "method.name",
    "use_dora": "method.name",
    "use_rslora": "method.name",
    "peft_use_dora": "method.name",
    "peft_use_rslora": "method.name",
    "loraplus_lr_ratio": "method.ratio",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "evaluation_strategy": "evaluation.every",
    "eval_file": "evaluation.path",
    "validation_file": "evaluation.path",
    "test_datasets": "evaluation.path",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "dataset_test_split": "evaluation.split",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.best_metric",
    "logging_steps": "logging.log_every",
    "wandb_project": "logging.wandb",
    "report_to": "logging.wandb",
    "resume_from_checkpoint": "resume",
    "auto_resume_from_checkpoints": "resume",
    "adapter_name_or_path": "adapter",
    "lora_model_dir": "adapter",
    "peft_model": "adapter",
}
"""Fields that other tools call by another name: transformers, TRL, PEFT and axolotl."""


def meant_field(name: str, fields: Mapping[str, str]) -> str | None:
    """Finds what an unknown name most likely stands for.

    Args:
        name: As it was given, with or without a section: "lr", "schedule.lr".
        fields: Known names, dotted where they have a section, and what to answer for each.

    Returns:
        The answer for the field of that meaning in another tool, of that name in another section,
        or of the most similar name; None if there is none.

    Example:
        >>> fields = {name: name for name in ("schedule.learning_rate", "schedule.steps")}
        >>> meant_field("lr", fields), meant_field("steps", fields), meant_field("lerning", fields)
        ('schedule.learning_rate', 'schedule.steps', 'schedule.learning_rate')
    """
    name = name.lower().replace("-", "_")
    last = name.rpartition(".")[2]
    if (elsewhere := ELSEWHERE.get(last, "")) in fields:
        return fields[elsewhere]
    by_last: dict[str, str] = {}
    for known, answer in fields.items():
        by_last.setdefault(known.rpartition(".")[2], answer)
    for among, cutoff in ((fields, 0.8), (by_last, 0.65)):
        wanted = name if among is fields else last
        if close := difflib.get_close_matches(wanted, among, n=1, cutoff=cutoff):
            return among[close[0]]
    return None
