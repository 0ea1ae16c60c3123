"""Adapters at rest: their factors, their formats, and the verbs that need no model."""
