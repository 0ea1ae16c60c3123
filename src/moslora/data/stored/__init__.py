"""Data that do not fit in memory: read, checked and tokenized by several processes into Arrow files, once."""
