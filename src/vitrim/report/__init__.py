"""Reports on finished runs: tables, figures, the HTML page, comparison with published numbers.

May import: method, paper, deploy, trainer, budget and what is below them. Importing it imports no
torch, matplotlib or wandb: `vitrim-report --help` and its tables need none of them.
"""
