"""A mixture of gated feed-forward experts, after routing."""
