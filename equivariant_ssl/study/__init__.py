"""Which augmentations should features be sensitive to? Runs in every role, compared over seeds."""
