"""The commands `vmae` and `python -m vmae`."""

import sys


def main() -> None:
    """Run `vmae.cli`, whose imports take a second or two: Ctrl-C in that time ends as it does later."""
    try:
        from vmae import cli
    except KeyboardInterrupt:
        print("\nvmae: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
