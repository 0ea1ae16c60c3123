"""Adapter formats: one module per format; ``table`` lists them, ``reading`` detects and reads one."""
