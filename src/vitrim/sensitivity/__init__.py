"""What removing anything costs: KL divergence from the dense network's decision.

    scorer.py       one pass forward and back over images, for every method that wants losses
    parts.py        what is scored                          statistics.py  sums over images
    curvature.py    the divergence's Gauss-Newton matrix    losses.py      from these to losses
    predict.py      losses of one network                   probes.py      losses that are measured
    edits.py        trials for them                         results.py     what the scorer keeps
    rotate.py       other bases for the dims of heads       settings.py    its choices

May import: trainer, budget, closed_form, network, plan, errors.
"""
