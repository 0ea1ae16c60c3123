"""Every verb of the command on small models and data, for laws that hold for all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter


@dataclass(frozen=True)
class World:
    """A base model, its adapters and data.

    Attributes:
        folder: Where all of it is.
        base, native, lora, data, heldout: Its parts.
    """

    folder: Path
    base: Path
    native: Path
    lora: Path
    data: Path
    heldout: Path

    @classmethod
    def make(cls, folder: Path, mark: str = "") -> World:
        """Make one.

        Args:
            folder: Where.
            mark: Is put into the name of every file and folder, and into the data.
        """
        names = ("base", "native", "lora", "train.jsonl", "heldout.jsonl")
        world = cls(folder, *(folder / f"{mark}{name}" for name in names))
        tiny.save_chat_model(world.base)
        for path, count in ((world.data, 24), (world.heldout, 5)):
            tiny.save_chat_data(path, count)
            said = json.dumps(f"say {mark}")[1:-1]
            path.write_text(path.read_text(encoding="utf-8").replace("say ", said), encoding="utf-8")
        torch.manual_seed(1)
        config = MoSLoRAConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(tiny.llama(vocab_size=259, max_position_embeddings=256), config)
        model.save_pretrained(world.native)
        export_adapter(world.native, world.lora)
        return world

    def recipe(self, out: Path) -> list[str]:
        """Return the settings of a short training."""
        settings = {
            "model": self.base,
            "data": self.data,
            "data.heldout": self.heldout,
            "adapter.r": 4,
            "task.metric": "json",
            "task.max_new_tokens": 4,
            "trainer.max_steps": 2,
            "trainer.learning_rate": "1e-2",
            "trainer.per_device_train_batch_size": 4,
            "output.dir": out,
            "output.name": "run",
        }
        return [f"{key}={value}" for key, value in settings.items()]

    def commands(self, out: Path) -> dict[str, list[str]]:
        """Return the arguments of every verb, by what it does; they write below ``out``, in this order."""
        few = out / "few.yaml"
        few.write_text(json.dumps({"model": str(self.base), "data": str(self.data)}), encoding="utf-8")
        base, native, lora, data = map(str, (self.base, self.native, self.lora, self.data))
        recipe = self.recipe(out / "runs")
        rates = ["--learning-rates", "1e-2", "--seeds", "2", "--validation", "4", "--steps", "1"]
        few_steps = [f"output.dir={out / 'mixed'}", "trainer.max_steps=2", "task.max_new_tokens=4"]
        few_tokens = ["--max-new-tokens", "2", "--transcript", str(out / "talk.jsonl")]
        return {
            "advise": ["advise", *recipe],
            "plan": ["plan", f"model={base}", "--length", "16"],
            "train": ["train", *recipe],
            "train, checks alone": ["train", "--dry-run", *recipe],
            "mix": ["mix", native, lora, *few_steps, "--recipe", str(few)],
            "compare": ["compare", *recipe, *rates, "--out", str(out / "compared")],
            "report": ["report", str(out / "runs" / "run")],
            "evaluate": ["evaluate", base, "--adapter", native, "--data", data, "--limit", "4"],
            "export": ["export", native, str(out / "exported")],
            "export to gguf": ["export", native, str(out / "a.gguf"), "--to", "gguf", "--base", base],
            "import": ["import", lora, str(out / "imported")],
            "combine": ["combine", native, lora, "--out", str(out / "combined")],
            "merge": ["merge", base, native, str(out / "merged")],
            "inspect": ["inspect", native, "--base", base, "--html", str(out / "inspected.html")],
            "chat": ["chat", lora, "--base", base, *few_tokens],
            "push": ["push", lora, "ada/tuned", "--dry-run"],
            "doctor": ["doctor", native, "--base", base, "--for", "peft,vllm,llama.cpp"],
        }
