"""For all tests: pytest's own means of testing plugins."""

pytest_plugins = ["pytester"]
