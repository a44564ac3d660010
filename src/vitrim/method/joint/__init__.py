"""Joint loss-aware compression: every edit on one scale, one budget over all.

    method.py       Joint: scorer, plan, compensation, recovery     settings.py  its choices
    evidence.py     from a scorer's evidence to losses and weights  budgets.py   the run's budgets
    choices.py      what each branch may lose                       paths.py     best in a budget
    allocation.py   from losses and budgets to edits
    reconstruct.py  MLP by MLP after the cut                        local.py     training of one MLP

The losses are those of `vitrim.sensitivity`. May import what a method may (`vitrim.method`).
"""
