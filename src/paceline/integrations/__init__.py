"""PLUG: paceline in other libraries' calls. `hf` serves transformers' `generate`."""
