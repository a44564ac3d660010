"""Mixed-rank compression: Linear layers in two factors, each of its own rank.

    method.py      MixedRank: scorer, plan, compensation, recovery
    settings.py    the choices of the configuration            pieces.py     what can be factorised
    profile.py     the scorer: statistics of each layer        metric.py     decompositions, losses
    ranks.py       ranks from curves and a limit, no network   allocation.py ranks within a target
    by_kl.py       losses as KL divergence                     residual.py   training of a residual
    regress.py     least squares on the compact network

May import what a method may (`vitrim.method`).
"""
