"""Families of text-to-image pipelines: the table, and a file for each that packs latents or words in its own way."""
