"""What engines do with a LoRA: one file of rules for each, as data, and the one evaluator that reads them."""
