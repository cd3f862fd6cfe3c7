"""Entry point of the command line: says what to install when the extra is missing."""

import sys


def main() -> None:
    try:
        from instantas.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("instantas"):
            raise
        needed = f"the command line needs {error.name}, which is not installed"
        sys.stderr.write(f"instantas: {needed}; pip install 'instantas[diffusers]' brings it\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
