"""What happens to the heads of one new token of each sequence: norms, rotation, storing, attention. In one operator."""
