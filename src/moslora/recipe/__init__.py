"""Recipes: the schema, its YAML, overrides and the trainer's arguments."""
