"""The command `vitrim`, as `python -m vitrim`."""

from vitrim.cli.start import vitrim

if __name__ == "__main__":
    vitrim()
