"""Fakes a user may also need: tiny random targets, a byte tokenizer, a scripted drafter."""
