"""The memory that a fine-tune takes of each GPU."""
