"""The proof that an exported LoRA gives the same logits in a fresh process with stock PEFT."""
