"""The way into a mixture of experts: the normalised residual stream, and the experts of each of its rows."""
