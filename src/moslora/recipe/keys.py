"""Keys of a recipe that are set elsewhere, have another name, or do not fit a kind of task; each with what to do."""

from __future__ import annotations

__all__ = ["BELONGING", "MANAGED", "MISNAMED", "MISSING", "SHORTHANDS", "UNFIT"]

# What a section means when it is one plain value.
SHORTHANDS: dict[str, str] = {
    "task": "kind",
    "model": "name",
    "data": "train",
    "parallel": "kind",
    "output": "name",
}
# What is forgotten with the value that a shorthand on the command line replaces: the held-out file of another data set,
# or the revision of another model, would be wrong without anybody noticing.
BELONGING: dict[str, tuple[str, ...]] = {
    "task": (),
    "model": ("revision", "variant", "tokenizer"),
    "data": (
        *("heldout", "train_split", "heldout_split", "format", "columns", "ignore"),
        *("prompt", "token", "class_name", "class_images", "class_prompt", "subjects"),
        *("subset", "revision", "labels"),
    ),
    "parallel": (),
    "output": (),
}
# Settings that the run decides, and what to set instead.
MANAGED: dict[str, str] = {
    "trainer.output_dir": "the run directory holds it; set output.dir and output.name",
    "trainer.resume_from_checkpoint": "use `moslora train --resume RUN`",
    "trainer.do_train": "a run always trains",
    "trainer.do_eval": "a run always evaluates before and after; trainer.eval_strategy adds to that",
    "trainer.do_predict": "set task.generate_examples",
    "trainer.trust_remote_code": "set model.trust_remote_code",
    "trainer.completion_only_loss": "set data.train_on",
    "trainer.assistant_only_loss": "every assistant turn is trained on; set data.train_on=all for every token",
    "trainer.chat_template_path": "a model's own template is used; set data.template=plain to do without",
    "trainer.dataset_text_field": "the column is called text; set data.format=text",
    "trainer.dataset_kwargs": "examples are encoded before the trainer sees them; see the data section",
    "trainer.eos_token": "the tokenizer's own ends a text, the chat template's own ends a turn",
    "trainer.model_init_kwargs": "set model.dtype, model.revision or model.attn_implementation",
    "trainer.hub_token": "a recipe is kept with its run, so it may hold no secret; set HF_TOKEN instead",
    "adapter.peft_type": "it is always MOSLORA",
    "adapter.task_type": "the task sets it",
    "adapter.auto_mapping": "PEFT sets it",
    "adapter.base_model_name_or_path": "set model.name",
    "adapter.revision": "set model.revision",
    "adapter.inference_mode": "a run trains",
    "adapter.peft_version": "PEFT sets it",
    "adapter.unlike_lora": "the model fills it in",
    "adapter.values_in_file": "saving fills it in",
}
# Names from older versions, from other programs, or without their section.
MISNAMED: dict[str, str] = {
    "adapter.rank": "adapter.r",
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "trainer.lr": "trainer.learning_rate",
    "trainer.epochs": "trainer.num_train_epochs",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_ratio": "trainer.warmup_steps, where a value below 1 is the fraction of all steps",
    "trainer.max_seq_length": "trainer.max_length",
    "trainer.evaluation_strategy": "trainer.eval_strategy",
    "trainer.group_by_length": "trainer.train_sampling_strategy: group_by_length",
    "data.path": "data.train",
    "data.drop": "data.ignore",
    "data.drop_columns": "data.ignore",
    "data.remove_columns": "data.ignore",
    "data.ignore_columns": "data.ignore",
    "data.column_names": "data.columns",
    "data.rename": "data.columns",
    "data.weights": "data.train: a list of {path: …, weight: …}",
    "data.mixture": "data.train: a list of {path: …, weight: …}",
    "data.thinking": "data.reasoning",
    "data.test": "data.heldout",
    "data.eval": "data.heldout",
    "data.validation": "data.heldout",
    "model.path": "model.name",
    "evaluation.forgetting": "evaluation.also",
    "evaluation.general": "evaluation.also",
    "data.also": "evaluation.also",
    "also": "evaluation.also",
    "task.problem_type": "task.problem",
    "task.num_labels": "data.labels, a list of their names",
    "data.num_labels": "data.labels, a list of their names",
    "data.id2label": "data.labels, a list of their names in order",
    "data.classes": "data.labels",
    "data.config": "data.subset",
    "data.configuration": "data.subset",
    "data.name": "data.subset",
    "data.num_proc": "trainer.dataset_num_proc",
    "data.workers": "trainer.dataset_num_proc",
    "lora": "adapter",
    "peft": "adapter",
    "training": "trainer",
    "dataset": "data",
    "start_from": "adapter.start_from",
    "adapter.start": "adapter.start_from",
    "adapter.resume_from": "adapter.start_from",
    "r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "target_modules": "adapter.target_modules",
    "mixer": "adapter.mixer",
    "lr": "trainer.learning_rate",
    "learning_rate": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_train_epochs": "trainer.num_train_epochs",
    "max_steps": "trainer.max_steps",
    "max_length": "trainer.max_length",
    "batch_size": "trainer.per_device_train_batch_size",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
}
# Settings that do not fit a kind of task, by section, and why. The files of image programs hold less than PEFT's,
# and it is better to say so before training than after.
UNFIT: dict[str, dict[str, dict[str, str]]] = {
    "vision": {
        "trainer": {
            "packing": "rows with pictures are not packed",
            "padding_free": "rows with pictures are padded",
        },
    },
    "preference": {
        "model": {"device_map": "it is not tested with two models in one loss"},
        "adapter": {
            "bias": "the reference is the base with the adapter off, and a trained bias of the base stays on",
        },
        "trainer": {
            "loss_type": "set task.loss",
            "loss_weights": "one loss is trained; set task.loss",
            "beta": "set task.beta",
            **dict.fromkeys(
                ("precompute_ref_log_probs", "precompute_ref_batch_size"),
                "the reference's log-probabilities are always computed once, before training, and kept with the run",
            ),
            **dict.fromkeys(
                ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
                "the reference is computed once and stays as it is",
            ),
            "padding_free": "pairs are padded; TRL has switched it off for them too",
            "label_smoothing_factor": "preferences have no labels to smooth; see trainer.label_smoothing",
            "generate_during_eval": "set task.generate_examples: base and tuned model answer side by side",
            "max_completion_length": "set trainer.max_length, of prompt and answer together",
            "is_encoder_decoder": "only decoders are trained",
            "remove_unused_columns": "the run decides it",
        },
    },
    "classification": {
        "evaluation": {"also": "it measures text, and a model with such a head writes none"},
        "model": {"device_map": "a model with such a head is loaded onto one device"},
        "trainer": {
            "label_names": "the run decides it",
            "remove_unused_columns": "the run decides it",
            "include_for_metrics": "the run measures before and after by itself",
            "neftune_noise_alpha": "it is for models that write text",
        },
    },
    "reward": {
        "evaluation": {"also": "it measures text, and a model with such a head writes none"},
        "model": {"device_map": "a model with such a head is loaded onto one device"},
        "trainer": {
            "remove_unused_columns": "the run decides it",
            "label_smoothing_factor": "a reward model's loss has no labels",
            "neftune_noise_alpha": "it is for models that write text",
        },
    },
    "image": {
        "evaluation": {"also": "it measures text, and pipelines write none"},
        "adapter": {
            "use_dora": "kohya's file, which a run writes too, holds no DoRA",
            "bias": "diffusers' files hold factors alone",
            "modules_to_save": "diffusers' files hold factors alone",
            "target_parameters": "diffusers' files hold factors alone",
            "trainable_token_indices": "diffusers' files hold factors alone",
        },
        "trainer": {
            "label_smoothing_factor": "a denoising loss has no labels",
            "train_sampling_strategy": "each picture comes once, in an order of the seed's, before any comes again",
            "neftune_noise_alpha": "a pipeline has no input embeddings; task.noise_offset changes the noise",
            "use_liger_kernel": "its kernels are language models'",
            "auto_find_batch_size": "which pictures a step sees is settled before training",
            "remove_unused_columns": "the run decides it",
            "activation_checkpointing_kwargs": "diffusers' own checkpointing takes none",
            "gradient_checkpointing_kwargs": "diffusers' own checkpointing takes none",
        },
    },
}
MISSING: dict[str, str] = {
    "model": "name the base model, as in model=smollm2-135m-instruct",
    "data": "name the examples, as in data=examples.jsonl",
    "mix": "name the trained adapters, as in mix.adapters=[runs/a/adapter, runs/b/adapter]",
}
