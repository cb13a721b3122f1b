"""RUN: everything that knows transformers: weights, row caches, the packed forward, vocabularies."""
