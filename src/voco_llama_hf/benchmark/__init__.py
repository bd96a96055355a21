"""What answering about a compressed image costs, beside no cache, a full key-value cache and a prompt of text alone."""
