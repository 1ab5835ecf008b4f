"""One page per experiment; what the fields mean is said once, in `fields`."""
