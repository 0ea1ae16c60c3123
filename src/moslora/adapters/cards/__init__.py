"""The README.md of an adapter: what the Hub shows of it."""
