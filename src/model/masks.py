"""How transformers makes attention masks, where tensors have no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from transformers import masking_utils


@contextmanager
def taken_for_single_rows() -> Iterator[None]:
    """Take positions for those of one row a sequence, which need no mask, without a look at them.

    transformers 5 compares positions to see whether rows are packed; without values it assumes that they are.
    """
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield
