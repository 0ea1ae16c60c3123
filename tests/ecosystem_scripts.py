"""Short training scripts in the manner of each library's own examples; ``tests/test_ecosystem.py`` runs them.

Each is written as its library's example is, with the configuration handed in: LoRA's, or ours. It stops before the line
that trains and returns a ``Session``, so that the tests can look at what is trained before and after.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tiny
from moslora import MoSLoRAConfig

ATTENTION = ["q_proj", "v_proj"]
LINEAR = [*ATTENTION, "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
STEPS = 3
LEARNING_RATE = 1e-2

# The configuration's class is the one name that changes. "held" is LoRA in our words: M = I, not trained.
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (LoraConfig, {}),
    "held": (MoSLoRAConfig, {"mixer": "identity", "train_mixer": False}),
    "moslora": (MoSLoRAConfig, {}),
    "moslora, orthogonal": (MoSLoRAConfig, {"mixer": "orthogonal"}),
}
Configure = Callable[..., Any]


def configure(method: str, **always: Any) -> Configure:
    """What a script calls where its library's example calls ``LoraConfig``."""
    cls, own = METHODS[method]
    return partial(cls, **{"r": 4, "lora_alpha": 8, **always, **own})


KIND = re.compile(r"lora_(?:embedding_)?(A|M|B|magnitude)")


@dataclass
class Ran:
    """What a script did: its log, and the share of entries that moved, by factor."""

    log: list[dict[str, float]]
    moved: dict[str, float]


@dataclass
class Session:
    """A script, up to the line that trains."""

    models: list[nn.Module]
    train: Callable[[], list[dict[str, float]]]  # returns what is logged at each step
    save: Callable[[Path], object] | None = None
    load: Callable[[Path], nn.Module] | None = None
    output: Callable[[nn.Module], Tensor] | None = None
    whole: Any = None  # what is saved, where that holds more than the model

    def factors(self) -> list[tuple[str, Tensor]]:
        """Every factor as the adapter's file would have it, with the letter by which it goes."""
        tensors = [
            (name, tensor.detach().clone())
            for model in self.models
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        ]
        return [(KIND.search(name)[1], tensor) for name, tensor in tensors if KIND.search(name)]

    def run(self) -> Ran:
        """Train, and tell which share of each kind of factor's entries is not as it was."""
        before = self.factors()
        log = self.train()
        moved: dict[str, list[Tensor]] = {}
        for (kind, start), (_, end) in zip(before, self.factors(), strict=True):
            moved.setdefault(kind, []).append((start != end).flatten())
        return Ran(log, {kind: float(torch.cat(found).float().mean()) for kind, found in moved.items()})


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a short and quiet run on the CPU, for any of Hugging Face's trainers."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    return {**settings, **changes}


def logged(trainer: Any) -> list[dict[str, float]]:
    """What a trainer logged at each step of what depends on the model.

    Where advantages are weighted, their sum is zero and the loss is what rounding left of it.
    """
    wanted = (
        "reward" if hasattr(trainer, "reward_funcs") else "loss",
        "grad_norm",
        "entropy",
        "rewards/margins",
    )
    return [
        {name: float(entry[name]) for name in wanted if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=tiny.tokens(length=8)).logits


def with_trainer(
    trainer: Any, load_base: Callable[[], Any], checkpoint: Path | None = None, **changes: Any
) -> Session:
    """The end of most examples: train, and save what the trainer saves; loaded as PEFT's documentation says."""

    def train() -> list[dict[str, float]]:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return logged(trainer)

    parts: dict[str, Any] = {
        "models": [trainer.model],
        "train": train,
        "save": lambda folder: trainer.save_model(str(folder)),
        "load": lambda folder: PeftModel.from_pretrained(load_base(), folder),
        "output": logits,
    }
    return Session(**{**parts, **changes})


def causal(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


# ---- TRL: trl/scripts/*.py ------------------------------------------------------------------------------------


def chats() -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"say {n}"},
                    {"role": "assistant", "content": str(n)},
                ]
            }
            for n in range(8)
        ]
    )


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": f"say {n} "} for n in range(8)])


def preferences() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"say {n} ", "chosen": "yes" * (1 + n % 2), "rejected": "no no"} for n in range(8)]
    )


def judgements() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"say {n} ", "completion": "yes" if n % 2 else "no", "label": bool(n % 2)}
            for n in range(8)
        ]
    )


def odd_reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward without sense, which differs between completions."""
    return [float(sum(ids) % 101) for ids in completion_ids]


FLOAT32 = {"dtype": "float32"}  # where a trainer loads the model itself


def trl(
    name: str, data: Callable[[], Dataset], base: Path, folder: Path, config: Configure, **settings: Any
) -> Session:
    """``trl/scripts/NAME.py``: the model by its path, the configuration as peft_config."""
    import trl as library

    extra: dict[str, Any] = {}
    if "reward_funcs" in settings:
        extra["reward_funcs"] = settings.pop("reward_funcs")
    trainer = getattr(library, f"{name}Trainer")(
        model=str(base),
        args=getattr(library, f"{name}Config")(**arguments(folder, model_init_kwargs=FLOAT32, **settings)),
        train_dataset=data(),
        peft_config=config(target_modules=ATTENTION, task_type="CAUSAL_LM"),
        **extra,
    )
    return with_trainer(trainer, lambda: causal(base))


def generating(name: str, base: Path, folder: Path, config: Configure) -> Session:
    return trl(
        name,
        prompts,
        base,
        folder,
        config,
        reward_funcs=odd_reward,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
    )


def trl_reward(base: Path, folder: Path, config: Configure) -> Session:
    """``trl/scripts/reward.py``, whose head of one label is trained whole."""
    from trl import RewardConfig, RewardTrainer

    def load_base() -> Any:
        torch.manual_seed(5)  # the head is new
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)

    trainer = RewardTrainer(
        model=load_base(),
        args=RewardConfig(**arguments(folder)),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=preferences(),
        peft_config=config(target_modules=ATTENTION, task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    return with_trainer(trainer, load_base)


# ---- transformers ---------------------------------------------------------------------------------------------


def texts(base: Path, labels: int | None = None) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [dict(tokenizer(f"say {n % 5}")) for n in range(8)]
    return Dataset.from_list(
        [{**row, **({"labels": n % labels} if labels else {})} for n, row in enumerate(rows)]
    )


def classification(base: Path, folder: Path, config: Configure) -> Session:
    """Trainer on a PEFT model, in the manner of PEFT's examples/sequence_classification."""

    def load_base() -> Any:
        torch.manual_seed(5)  # the head is new
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)

    model = get_peft_model(load_base(), config(target_modules=ATTENTION, task_type=TaskType.SEQ_CLS))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder)),
        train_dataset=texts(base, labels=3),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    return with_trainer(trainer, load_base)


def language_model(
    model: Any, base: Path, folder: Path, prepare: Callable[[], object] = lambda: None, **settings: Any
) -> Trainer:
    """A Trainer of a language model; ``prepare`` is called when its arguments have found the device."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = arguments(folder, **settings)
    args = TrainingArguments(**settings)
    prepare()
    return Trainer(
        model=model,
        args=args,
        train_dataset=texts(base),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def causal_lm(base: Path, folder: Path, config: Configure) -> Session:
    """Trainer on a PEFT model, in the manner of transformers' examples/pytorch/language-modeling."""
    model = get_peft_model(causal(base), config(target_modules="all-linear", task_type="CAUSAL_LM"))
    return with_trainer(language_model(model, base, folder), lambda: causal(base))


def add_adapter(base: Path, folder: Path, config: Configure) -> Session:
    """transformers' own ``model.add_adapter``, as its documentation of PEFT trains, saves and loads."""
    model = causal(base)
    model.add_adapter(config(target_modules=ATTENTION, task_type="CAUSAL_LM"), adapter_name="default")
    trainer = language_model(model, base, folder)

    def load(saved: Path) -> Any:
        again = causal(base)
        again.load_adapter(str(saved))
        return again

    return with_trainer(trainer, lambda: causal(base), save=model.save_pretrained, load=load)


# ---- PEFT: examples/sft/train.py ------------------------------------------------------------------------------


class SaveAdapter(TrainerCallback):
    """The callback that PEFT's examples bring, which writes the adapter beside each checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        kwargs["model"].save_pretrained(
            Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_model"
        )
        return control


def peft_sft(base: Path, folder: Path, config: Configure, resume: bool = False) -> Session:
    """``examples/sft/train.py``: gradient checkpointing, evaluations, checkpoints with a callback."""
    from trl import SFTConfig, SFTTrainer

    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "packing": True,
        "max_length": 64,
        "lr_scheduler_type": "cosine",
        "weight_decay": 1e-4,
    }
    model = causal(base)
    model.config.use_cache = False
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(base),
        args=SFTConfig(**arguments(folder, **settings)),
        train_dataset=chats(),
        eval_dataset=chats(),
        peft_config=config(target_modules="all-linear", task_type="CAUSAL_LM", bias="none"),
        callbacks=[SaveAdapter()],
    )
    trainer.model.print_trainable_parameters()
    return with_trainer(trainer, lambda: causal(base), checkpoint=folder / "checkpoint-2" if resume else None)


# ---- diffusers: examples/dreambooth/train_dreambooth_lora.py ---------------------------------------------------


def dreambooth(
    base: Path,
    folder: Path,
    config: Configure,
    rank: int = 4,
    mixed_precision: str = "no",
    max_steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    lr_scheduler_type: str = "constant",
    resume: bool = False,
) -> Session:
    """The script's training loop with its text encoder, and accelerate's checkpoints through the script's two hooks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params

    import tiny_pipelines

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    torch.manual_seed(1)
    pipeline = tiny_pipelines.sd(prediction="epsilon")
    noise_scheduler = DDPMScheduler()
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    for part in (unet, text_encoder):
        part.requires_grad_(False)
        part.to(accelerator.device, dtype=weight_dtype)
    settings = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
    unet.add_adapter(config(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **settings))
    text_encoder.add_adapter(config(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **settings))
    parts = {type(part).__name__: part for part in (unet, text_encoder)}

    def save_model_hook(models: list[Any], weights: list[Any], output_dir: str) -> None:
        for model in models:
            tensors = get_peft_model_state_dict(accelerator.unwrap_model(model))
            save_file(tensors, Path(output_dir) / f"{type(model).__name__}.safetensors")
            weights.pop()

    def load_model_hook(models: list[Any], input_dir: str) -> None:
        while models:
            model = models.pop()
            tensors = load_file(Path(input_dir) / f"{type(model).__name__}.safetensors")
            found = set_peft_model_state_dict(model, tensors, adapter_name="default")
            assert not found.unexpected_keys
        if mixed_precision == "fp16":
            cast_training_params(list(parts.values()), dtype=torch.float32)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    if mixed_precision == "fp16":
        cast_training_params([unet, text_encoder], dtype=torch.float32)
    trained = [p for part in (unet, text_encoder) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-2)
    lr_scheduler = get_scheduler(lr_scheduler_type, optimizer=optimizer)
    batches = torch.utils.data.DataLoader(range(max_steps), batch_size=1)
    unet, text_encoder, optimizer, batches, lr_scheduler = accelerator.prepare(
        unet, text_encoder, optimizer, batches, lr_scheduler
    )
    checkpoint = folder / "checkpoint-2"

    def train() -> list[dict[str, float]]:
        log = []
        if resume:
            accelerator.load_state(checkpoint)
        for step, (number,) in enumerate(zip(batches, strict=True), start=1):
            if resume and step <= 2:
                continue
            generator = torch.Generator().manual_seed(int(number))
            draw = partial(torch.randn, generator=generator)
            unet.train()
            text_encoder.train()
            with accelerator.accumulate(unet):
                latents, noise = draw(2, 4, 8, 8).to(weight_dtype), draw(2, 4, 8, 8).to(weight_dtype)
                timesteps = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (2,), generator=generator
                )
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                states = text_encoder(torch.arange(16).view(2, 8), return_dict=False)[0]
                found = unet(noisy, timesteps, states, return_dict=False)[0]
                loss = nn.functional.mse_loss(found.float(), noise.float(), reduction="mean")
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            log.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
            if step == 2:
                accelerator.save_state(checkpoint)
        return log

    return Session(list(parts.values()), train)


# ---- sentence-transformers: examples/sentence_transformer/training/peft ----------------------------------------


def sentences(base: Path, folder: Path, config: Configure) -> Session:
    """Its ``add_adapter`` and its trainer, with the loss of the example."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(str(base), model_kwargs={"dtype": "float32"}, device="cpu")
    settings = {
        "task_type": TaskType.FEATURE_EXTRACTION,
        "inference_mode": False,
        "target_modules": ATTENTION,
    }
    model.add_adapter(config(**settings))
    pairs = [{"question": f"say {n}", "answer": str(n)} for n in range(8)]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments(folder)),
        train_dataset=Dataset.from_list(pairs),
        loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=1),
    )
    return with_trainer(
        trainer,
        lambda: None,
        models=[model.transformers_model],
        save=lambda saved: model.save_pretrained(str(saved)),
        load=lambda saved: SentenceTransformer(str(saved), model_kwargs={"dtype": "float32"}, device="cpu"),
        output=lambda model: model.encode(["say 1", "three"], convert_to_tensor=True),
        whole=model,
    )


# ---- ways in which trainers cast -------------------------------------------------------------------------------


BFLOAT16 = {"dtype": torch.bfloat16}
# Steps that bfloat16 can take from most entries of A of a model as wide as WIDE, and from few of M.
CAST = {"max_steps": 5, "learning_rate": 4e-4, "lr_scheduler_type": "constant"}
WIDE = {"hidden_size": 128, "intermediate_size": 128}


def trl_quantized(base: Path, folder: Path, config: Configure) -> Session:
    """TRL's cast of what is trained over a quantized base, on a base that only says that it is one."""
    from trl import SFTConfig, SFTTrainer

    model = causal(base)
    model.is_loaded_in_8bit = True
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(folder, **CAST)),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=chats(),
        peft_config=config(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return with_trainer(trainer, lambda: causal(base))


def trl_qlora(base: Path, folder: Path, config: Configure) -> Session:
    """``trl/scripts/sft.py --load_in_4bit``: a base in nf4, through bitsandbytes."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(**arguments(folder, **CAST, model_init_kwargs={"device_map": {"": "cpu"}})),
        train_dataset=chats(),
        quantization_config=quantization,
        peft_config=config(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return with_trainer(trainer, lambda: causal(base))


def whole_model(base: Path, folder: Path, config: Configure) -> Session:
    """``model.to(torch.bfloat16)``, as scripts cast that never heard of adapters."""
    model = get_peft_model(causal(base), config(target_modules="all-linear", task_type="CAUSAL_LM"))
    return with_trainer(language_model(model.to(torch.bfloat16), base, folder, **CAST), lambda: causal(base))


def no_autocast(base: Path, folder: Path, config: Configure) -> Session:
    """A bfloat16 base with autocast_adapter_dtype=False, as TRL adapts models for ZeRO-3."""
    model = AutoModelForCausalLM.from_pretrained(base, **BFLOAT16)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, config(**settings), autocast_adapter_dtype=False)
    return with_trainer(language_model(model, base, folder, **CAST), lambda: causal(base))


def low_add_adapter(base: Path, folder: Path, config: Configure) -> Session:
    """transformers' ``add_adapter`` on a bfloat16 base."""
    model = AutoModelForCausalLM.from_pretrained(base, **BFLOAT16)
    model.add_adapter(config(target_modules=LINEAR, task_type="CAUSAL_LM"))
    return with_trainer(language_model(model, base, folder, **CAST), lambda: causal(base))


SCRIPTS: dict[str, Callable[[Path, Path, Configure], Session]] = {
    "TRL SFT": partial(trl, "SFT", chats),
    "TRL DPO": partial(trl, "DPO", preferences),
    "TRL KTO": partial(trl, "KTO", judgements),
    "TRL GRPO": partial(generating, "GRPO"),
    "TRL RLOO": partial(generating, "RLOO"),
    "TRL reward": trl_reward,
    "transformers classification": classification,
    "transformers causal LM": causal_lm,
    "transformers add_adapter": add_adapter,
    "PEFT examples/sft": peft_sft,
    "diffusers dreambooth": dreambooth,
    "sentence-transformers": sentences,
}

# What each is in the manner of.
EXAMPLES = {
    "TRL SFT": "`trl/scripts/sft.py`",
    "TRL DPO": "`trl/scripts/dpo.py`",
    "TRL KTO": "`trl/scripts/kto.py`",
    "TRL GRPO": "`trl/scripts/grpo.py`",
    "TRL RLOO": "`trl/scripts/rloo.py`",
    "TRL reward": "`trl/scripts/reward.py`, the head trained whole",
    "transformers classification": "Trainer on `get_peft_model(…)`, as PEFT's `examples/sequence_classification`",
    "transformers causal LM": "Trainer on `get_peft_model(…)`, as `examples/pytorch/language-modeling`",
    "transformers add_adapter": "`model.add_adapter`, Trainer, `save_pretrained`, `load_adapter`",
    "PEFT examples/sft": "`examples/sft/train.py`: gradient checkpointing, packing, a callback, resumed",
    "diffusers dreambooth": "`train_dreambooth_lora.py`'s loop with the text encoder, resumed by accelerate's hooks",
    "sentence-transformers": "`examples/sentence_transformer/training/peft`",
}

CASTS: dict[str, Callable[[Path, Path, Configure], Session]] = {
    "TRL over a quantized base": trl_quantized,
    "TRL over nf4": trl_qlora,
    "model.to(bfloat16)": whole_model,
    "autocast_adapter_dtype=False": no_autocast,
    "add_adapter on a bfloat16 model": low_add_adapter,
    # Entries of a gaussian A are 1/r.
    "diffusers, mixed_precision=bf16": partial(dreambooth, mixed_precision="bf16", rank=16, **CAST),
}

# What the default environment does not have.
NEEDED = {"sentence-transformers": "sentence_transformers", "TRL over nf4": "bitsandbytes"}
