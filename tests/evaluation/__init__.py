"""Every estimator against numbers that are known, and what is made of them."""
