"""PRACTISE and MiR: whole blocks dropped; `recoverability` is the scorer that ranks them.

May import: deploy, trainer, budget, closed_form, network, data and what is below them; no other
method.
"""
