"""Methods compared on the user's own data."""
