"""The configuration: its schema, its rules, and how a command line becomes one.

``schema`` is imported by everybody; ``compose`` imports Hydra and is for the launching process.
"""
