"""Each row in e4m3 codes with one scale."""
