"""What follows from weights and activation statistics without training.

`moments` gathers statistics, `importance` ranks units by them, `reconstruction` changes the kept
weights to compensate for removed units. May import: network, plan, errors; no lightning.
"""
