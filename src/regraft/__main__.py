"""The command ``regraft``, and ``python -m regraft``: signals first, then all that takes time to load."""

import importlib
import os
import sys

from regraft import signals


def main() -> None:
    """Runs the command line of this process and exits."""
    open_closed_streams()
    signals.install()
    try:
        code = importlib.import_module("regraft.cli.app").run(sys.argv[1:])
        signals.close()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = signals.exit_code()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 2
        sys.stdout = None
    sys.exit(code)


def open_closed_streams() -> None:
    """Opens the null device in the place of standard streams that were closed, as by ``>&-``: the next file would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    main()
