"""What follows from weights and activation statistics without training: importance, reconstruction.

May import: network, data, jobs and what is below them; no lightning.
"""
