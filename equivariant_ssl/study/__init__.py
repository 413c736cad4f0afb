"""Which augmentations should features be sensitive to? Runs of every role, over seeds, and what they say together."""
