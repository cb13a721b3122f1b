"""Losses and data for training drafters, compared after Direct Alignment (arXiv 2403.00858)."""
