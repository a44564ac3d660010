"""How much may remain and what a plan costs: targets, the closed formula, the largest plan.

May import: store, measure, closed_form, network, data, jobs and what is below them.
"""
