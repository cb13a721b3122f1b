"""REPEAT: the demo, and experiments that combine all rooms."""
