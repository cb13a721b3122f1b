"""DO: the public verbs on one configuration. Results are where the configuration's `paths` say."""
