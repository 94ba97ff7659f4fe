"""Where the `peer` command starts: it imports the rest itself, so that Ctrl-C meanwhile leaves no traceback."""

import sys


def main() -> None:
    """The entry point."""
    try:
        from peer.commands.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
