"""COMMAND: one thin file per verb, imported only when that verb runs."""
