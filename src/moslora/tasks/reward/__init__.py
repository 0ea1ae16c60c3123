"""Reward models: one number for an answer, learned from pairs."""
