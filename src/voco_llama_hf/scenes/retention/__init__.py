"""What survives compression: VoCo tokens beside other ways to shorten an image, trained alike (paper, Table 1)."""
