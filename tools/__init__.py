"""Developer scripts; never packaged, and nothing of the product imports them."""
