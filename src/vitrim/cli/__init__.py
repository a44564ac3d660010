"""The commands: vitrim, vitrim-eval, vitrim-report, vitrim-export and vitrim-bench.

The only room that imports hydra and omegaconf. May import every other room.
"""
