"""A query and its response, put into words by `prompt_template`."""

from src.data.formats import read_texts as read

__all__ = ["read"]
