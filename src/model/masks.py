"""transformers' attention masks on tensors without values."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from transformers import masking_utils


@contextmanager
def no_packing_detection() -> Iterator[None]:
    """Treat every sequence as a single row, which needs no mask, without reading positions.

    transformers 5 compares positions to see whether rows are packed; without values it assumes that they are.
    """
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield
