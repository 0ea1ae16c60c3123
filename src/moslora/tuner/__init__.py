"""The live adapter: PEFT's grammar for MoSLoRA."""
