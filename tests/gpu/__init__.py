"""What is to be shown on a GPU, as one script of a few minutes: `python -m tests.gpu`.

Without a GPU it says what it would run. `--tiny` runs every part on the CPU with a tiny network,
which shows that the script works and nothing else.
"""
