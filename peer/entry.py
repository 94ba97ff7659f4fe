"""Where the `peer` command starts: it imports the rest itself, so that Ctrl-C meanwhile leaves no traceback."""

import sys


def main() -> None:
    """The entry point."""
    try:
        from peer.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
