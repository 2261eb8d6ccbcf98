"""``python -m regraft`` is the command ``regraft``."""

from regraft.cli.app import main

main()
