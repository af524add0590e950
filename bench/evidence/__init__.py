"""What the engine was seen to do, one file a part. Parts ask the tests' own helpers, so that both mean one thing."""
