"""Two texts: a prompt and the completion that is learned."""

from src.data.formats import read_texts as read

__all__ = ["read"]
