"""attention_decode where sequences have leading pages in common, which are read once for all of them."""
