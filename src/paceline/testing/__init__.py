"""TEST: tiny random targets, a byte tokenizer and scripted drafters, for users' tests too."""
