"""The top layer: the command line, the recipe schema, the shipped recipes, and the code that runs them."""
