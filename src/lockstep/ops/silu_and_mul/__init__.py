"""SwiGLU: silu of the first half times the second half."""
