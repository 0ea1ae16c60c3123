"""Preferences: learning from pairs of answers, or from answers that are wanted or not, with TRL's trainers."""
