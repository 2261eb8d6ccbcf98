"""Texts and records, and their token ids."""
