"""The top floor: the command line, the recipe schema, the shipped recipes, and what runs them."""
