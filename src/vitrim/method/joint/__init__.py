"""Joint loss-aware compression: every edit on one scale, one budget over all.

    method.py       Joint: scorer, plan, compensation, recovery     settings.py  its choices
    scorer.py       one pass forward and back over images           parts.py     what is scored
    curvature.py    the divergence's Gauss-Newton matrix            statistics.py  sums over images
    losses.py       losses of units, directions and components      predict.py   of one network
    probes.py       losses that are measured                        edits.py     trials for them
    results.py      what the scorer keeps                           evidence.py  what follows
    choices.py      what each branch may lose                       paths.py     best in a budget
    allocation.py   from losses and budgets to edits                budgets.py   the run's budgets
    rotate.py       other bases for the dims of heads
    reconstruct.py  MLP by MLP after the cut                        local.py     training of one MLP

May import what a method may (`vitrim.method`).
"""
