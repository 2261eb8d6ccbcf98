"""The command ``regraft``, and ``python -m regraft``: signals first, then all that takes time to load."""

import importlib
import sys

from regraft import signals


def main() -> None:
    """Runs the command line of this process and exits."""
    signals.install()
    try:
        code = importlib.import_module("regraft.cli.app").run(sys.argv[1:])
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = signals.exit_code()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 2
        sys.stdout = None
    sys.exit(code)


if __name__ == "__main__":
    main()
