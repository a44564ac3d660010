"""DC-ViT: dense few-shot compression of blocks, its trials and its synthetic images.

`method` is the method, `settings` its nested settings. `trials` is the scorer; `trial_training`,
`rounds`, `evaluation`, `mlp_statistics` and `synthetic` are its parts. `candidates` chooses blocks,
`compression` compresses them, `progressive` orders the recovery, `accounting` counts as the paper
does. May import: deploy, trainer, budget, closed_form, network, data and what is below them; no
other method.
"""
