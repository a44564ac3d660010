"""Mixed-rank compression: metrics, curves of errors, ranks, and the regressions of its own."""
