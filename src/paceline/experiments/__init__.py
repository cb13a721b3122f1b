"""REPEAT: the offline verbs on one configuration, the demo, and experiments of all rooms."""
