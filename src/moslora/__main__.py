"""``python -m moslora``: the command, for launchers that start a module."""

from moslora.cli import main

if __name__ == "__main__":
    main()
