"""One text, all of it learned: continued training."""

from src.data.formats import read_texts as read

__all__ = ["read"]
