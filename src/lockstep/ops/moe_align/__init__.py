"""Token-expert pairs in the order of their experts, padded to whole blocks."""
