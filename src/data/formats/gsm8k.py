"""A question, and an answer with `<<48/2=24>>` notes as thoughts that ends in `#### 24`."""

from src.data.formats import read_texts as read

__all__ = ["read"]
