"""A product of the normalised residual stream, with the sum before it and the gate behind it."""
