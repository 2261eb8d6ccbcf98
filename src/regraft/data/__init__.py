"""Texts, records and what models read of them: token ids."""
