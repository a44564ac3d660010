"""Networks as a run takes them: weights from anywhere, timm's entrypoint, new heads.

May import: trainer, store, network, data and what is below them.
"""
