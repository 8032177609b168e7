"""The Hydra tree, installed as ``launcher.conf``."""
