"""What runs have found, for people: tables, figures, the page, published numbers beside ours.

May import: method, paper, deploy, trainer, budget and what is below them; imports no torch itself.
"""
