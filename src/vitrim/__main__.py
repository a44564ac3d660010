"""The command `vitrim`, as `python -m vitrim`."""

from vitrim.cli.app import main

if __name__ == "__main__":
    main()
