"""LEARN: train and evaluate policies from a collection. No transformer runs here."""
