"""Products of e4m3 matrices with scales per tensor, per row or per block."""
