"""Entry point of the command line: says what to install when the extra is missing."""

import sys


def main() -> None:
    try:
        from instantas.cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(f"instantas: {error}; the command line needs: pip install 'instantas[diffusers]'\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
