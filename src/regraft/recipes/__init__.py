"""Recipes to run as they are (``regraft run quickstart``) or to copy and change."""
