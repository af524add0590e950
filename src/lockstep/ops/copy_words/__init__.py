"""Words copied between the memory of a device and pinned memory of the host, by a kernel."""
