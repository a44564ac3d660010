"""How much of a network may remain, and what a plan costs.

`target` resolves a strength or a number, `cost` is the closed formula for params and MACs, `trim`
finds the largest plan for units within a target, `blocks` that for whole blocks, and `latency`
predicts times from a table measured on this device. May import: store, measure, closed_form,
network, data, jobs and what is below them; no lightning.
"""
