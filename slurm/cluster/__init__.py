"""The test cluster: real slurmctld and slurmd on one machine, each host in namespaces of its own.

Standard library only: it is run by whatever python3 there is. Nothing here knows of T-minus.
"""
