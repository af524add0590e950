"""GeGLU: gelu of the first half, exact or by tanh, times the second half."""
