"""The dense networks that a run starts from: weights from timm, a file or training; new heads.

May import: trainer (for the recipe of dense training), data, store, network and what is below them.
"""
