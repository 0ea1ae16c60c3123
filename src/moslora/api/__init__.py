"""The Python API: everything that the command does is one call, which takes objects where the command takes paths."""
