"""Tri-gram statistics of text, and trees of drafts searched in them (arXiv 2407.12021).

table.py     the statistics as one memory-mapped file
build.py     that file from any amount of text, within a bound on memory
kernels.py   learning from a row's text and searching for a draft, compiled
reference.py the same in plain Python, to be read and to be compared with
drafter.py   the drafter
"""
