"""What answering about a compressed image costs, beside no cache, a full key-value cache and text alone."""
