"""Runs on SLURM: what is submitted, what happens in the job, what the queue says.

Each module is imported when it is needed: asking the queue costs no submitit, and submitting no torch.
"""
