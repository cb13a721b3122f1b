"""Tri-gram statistics of text, and trees of drafts searched in them (arXiv 2407.12021).

table.py     the statistics as one memory-mapped file
build.py     builds that file from any amount of text, within a bound on memory
corpora.py   the texts it is built from
kernels.py   learns from a row's text and searches for a draft, compiled; its readable twin is
             paceline.testing.trigram_reference
search.py    the kernels with the settings and memory of a drafter
drafter.py   the drafter and its settings
"""
