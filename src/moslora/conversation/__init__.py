"""A conversation with a base model and its adapters, side by side; the verb chat."""
