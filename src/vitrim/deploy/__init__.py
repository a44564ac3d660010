"""A saved network on its way to use: exports, model cards, int8, latency of exported files.

May import: store, measure, network, data, jobs and what is below them.
"""
