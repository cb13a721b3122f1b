"""PLUG: paceline inside other libraries' calls. `hf` is transformers' `generate`."""
