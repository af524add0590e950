"""Embeddings and rotation angles of a step's rows, whose tokens the step before may have chosen."""
