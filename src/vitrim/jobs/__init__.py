"""Runs as processes: what stops a run, what became of it, and how several processes share one.

`signals` notes requests to stop, `status` records the state of a run, `lock` admits one run at a
time to a folder, `sweep` and `slurm` run jobs, here or on a cluster, and `distributed` joins the
processes of one run.

May import: files, plan, versions and errors. It knows neither networks nor data.
"""
