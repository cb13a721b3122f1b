"""REPEAT: the demo, the papers' experiments, and their recipes."""
