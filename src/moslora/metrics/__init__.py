"""What is measured on answers and choices, and how sure it is."""
