"""CHOOSE: features, policies and their artefacts. Arms are names here; no engine, no drafters."""
