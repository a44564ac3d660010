"""Ratios of vitrim to what else does the same work: `python -m tests.bench`.

Each benchmark lets ours and the peer take turns in one process and compares the times of each
turn, so that a machine which slows down or is shared slows both. Nothing here is a test: no time is
asserted. That both sides did the same work is checked, once, before the clock starts.
"""
