"""Picture benchmarks that are scored by rule: their files, prompts, rules and scores."""
