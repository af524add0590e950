"""GeGLU: tanh-approximated gelu of the first half times the second half."""
