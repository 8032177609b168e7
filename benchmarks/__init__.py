"""What is claimed, measured side by side. Does not belong here: tests of correctness, and anything the engine needs."""
