"""Where advice comes from."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["GUESS", "SOURCES"]

GUESS = "our guess"  # what stands for a source where there is none

SOURCES: Mapping[str, str] = {
    "regret": "LoRA Without Regret, Thinking Machines, 2025, thinkingmachines.ai/blog/lora",
    "tinker": "tinker-cookbook, hyperparam_utils.get_lr and its DPO and RL recipes",
    "trl": "TRL's page LoRA Without Regret, huggingface.co/docs/trl/lora_without_regret",
    "moslora": "MoSLoRA, arXiv:2406.11909",
    "lorafactory": "LoRAFactory, arXiv:2601.22708, tables of MoSLoRA and LoRA, rank 8, one seed",
    "alpha": "arXiv:2602.06204",
    "batch": "arXiv:2602.09492",
    "rl": "arXiv:2512.23165",
    "maths": "docs/maths.md: the variance of a kaiming mixer",
    "home": "ours: benchmarks/results/evidence/home, SmolLM2-135M, rank 16, 20 steps, five seeds",
    "targets": "ours: benchmarks/results/advice-targets.json",
}
