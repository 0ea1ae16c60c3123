"""Reinforcement learning on the demo's task, with its exact match as the reward: TRL's GRPO and nothing of our own.

    moslora train recipes/demo.yaml                                an adapter that is right often enough to learn from
    python recipes/home/reinforce.py --adapter runs/demo/adapter   trains it further; runs/reinforce has the result

The policy is the base with the adapter, as it is trained; that same adapter as it was is the reference, if --beta asks
for one. A reward that is the same for all answers to a prompt teaches nothing, so a model that is never right has to be
taught by examples first. docs/rl.md tells more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Answers = Sequence[Sequence[dict[str, str]]]  # what TRL hands to a reward: each a list of messages


def read(split: str, count: int) -> list[dict[str, Any]]:
    """Return prompts with their right answers, in the order of the demo's data."""
    lines = (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line)["messages"] for line in lines]
    return [{"prompt": row[:-1], "right": row[-1]["content"]} for row in rows]


def parsed(text: str) -> Any:
    """Return the JSON of an answer; None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def exact_match(completions: Answers, right: Sequence[str], **_: Any) -> list[float]:
    """Reward 1 for the right commands, whatever the white space."""
    pairs = zip(completions, right, strict=True)
    return [float(parsed(answer[-1]["content"]) == json.loads(wanted)) for answer, wanted in pairs]


def well_formed(completions: Answers, right: Sequence[str], **_: Any) -> list[float]:
    """Reward a tenth for a list of commands, right or wrong."""
    return [0.1 * isinstance(parsed(answer[-1]["content"]), list) for answer in completions]


def share_right(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], new_tokens: int) -> float:
    """Return the share of prompts that are answered exactly, without sampling."""
    from moslora.tasks.text.generation import Generation, generate_from_prompts

    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    prompts = [tokenizer.apply_chat_template(row["prompt"], **template)["input_ids"] for row in rows]
    settings = Generation(new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id or 0)
    device = str(next(model.parameters()).device)
    texts = generate_from_prompts(model, tokenizer, prompts, settings, device, 32, lambda _: None)
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return sum(exact_match(answers, [row["right"] for row in rows])) / len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure before and after, and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="the base: packaged name, folder or hub id"
    )
    parser.add_argument("--adapter", required=True, help="where to start: a native adapter")
    parser.add_argument("--out", default="runs/reinforce")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--generations", type=int, default=6, help="answers to each")
    parser.add_argument("--new-tokens", type=int, default=56)
    parser.add_argument(
        "--heldout", type=int, default=60, help="held-out requests that are answered before and after"
    )
    parser.add_argument(
        "--beta", type=float, default=0.0, help="weight of the KL from the start; 0 needs no reference"
    )
    # tinker-cookbook has 4e-5 for reinforcement learning with LoRA
    parser.add_argument("--learning-rate", type=float, default=4e-5)
    asked = parser.parse_args(arguments)

    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    import moslora
    from moslora.models.gguf import materialize
    from moslora.models.loading import load_model, load_tokenizer
    from moslora.models.names import resolve_model

    source = materialize(resolve_model(asked.model), "float32", say=print)
    on_gpu = torch.cuda.is_available()
    base = load_model(source, "float32", device="cuda" if on_gpu else "cpu")
    tokenizer: AutoTokenizer = load_tokenizer(source)
    model = PeftModel.from_pretrained(base, asked.adapter, is_trainable=True)
    heldout = read("heldout", asked.heldout)
    before = share_right(model, tokenizer, heldout, asked.new_tokens)
    config = GRPOConfig(
        output_dir=f"{asked.out}/checkpoints",
        max_steps=asked.steps,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=asked.prompts * asked.generations,
        num_generations=asked.generations,
        max_completion_length=asked.new_tokens,
        temperature=1.0,
        beta=asked.beta,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpu,
        bf16=on_gpu,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[exact_match, well_formed],
        args=config,
        train_dataset=Dataset.from_list(read("train", 10_000)),
        processing_class=tokenizer,
    )
    trainer.train()
    after = share_right(trainer.model, tokenizer, heldout, asked.new_tokens)
    out = Path(asked.out)
    trainer.model.save_pretrained(out / "adapter", selected_adapters=["default"])
    proof = moslora.export(out / "adapter", out / "lora").proof
    print(
        f"{len(heldout)} held-out requests, exact match: {before:.1%} → {after:.1%} after {asked.steps} steps."
    )
    print(f"Plain LoRA: {out / 'lora'}, largest relative error of ΔW {proof.max_relative_error:.1e}.")


if __name__ == "__main__":
    main()
