"""What runs inside of sandboxes, on the standard library alone; of the toolkit only `wire` is imported elsewhere."""
