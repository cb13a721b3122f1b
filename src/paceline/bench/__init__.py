"""MEASURE: the cost table, timed runs, tables and plots."""
