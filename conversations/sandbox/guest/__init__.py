"""Scripts that run inside sandboxes, with the standard library only; the rest of the toolkit imports only `wire`."""
