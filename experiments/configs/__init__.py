"""One flat page per experiment."""
