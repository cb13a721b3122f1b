"""Experiments after *Context-Aware Assistant Selection* (arXiv 2408.08470), a module each.

Each has a function `run(bench: Workbench) -> Findings`; `catalog` gives it its name.
"""
