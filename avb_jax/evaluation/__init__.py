"""Estimators, one per file. They take params and give numbers in nats; averaging is left to the caller."""
