"""The pages and figures that are made of files: `python -m tests.pages` writes them.

    results/*.json     docs/results.md, two tables of README.md, docs/tradeoff.svg
    conf/              docs/configuration.md
    conf/experiment/   docs/experiments.md

`tests/test_pages.py` fails where a page and its files differ.
"""
