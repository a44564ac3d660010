"""Runs as processes: signals, status files, locks, sweeps, SLURM, several processes of one run.

May import: files, plan, versions and errors.
"""
