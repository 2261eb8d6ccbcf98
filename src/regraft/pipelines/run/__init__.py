"""A run of a recipe: the recipe, its stages and the run folder."""
