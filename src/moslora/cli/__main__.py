"""``python -m moslora.cli``: the command, under the name that it had as a file."""

from moslora.cli import main

main()
