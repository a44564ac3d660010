"""The Lightning phases that methods share, and what runs, resumes and records them.

    phase.py     the protocols of a phase; a phase that lacks a member is refused
    phases.py    PhaseRunner: runs one phase with a Trainer of its own, or loads its finished result
    phase_images.py, trainer_options.py   its images, and the options of its Trainer
    resume.py    checkpoints within a phase            tracking.py   metrics.jsonl, W&B, TensorBoard
    recipe.py    AdamW with warm-up and cosine decay   batchnorm.py  statistics of folded BatchNorms
    classify.py  supervised training, evaluation       mimic.py      training towards a teacher
    recovery.py  the same from few images, with views.py, low_rank_updates.py and kept_states.py
    calibrate.py, collect.py   scorers that train nothing, with shared_pass.py
    refit.py     least squares on the compact network

May import: store, measure, closed_form, network, data, jobs and what is below them. No method.
"""
