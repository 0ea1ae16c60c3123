"""The method: pure functions (start at functional.py), the table of mixers, and the fast operators."""
