"""What every trial would do once for itself, done by the fork server, which imports this: no threads, no CUDA."""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # makes the table of all models' weight names, which is kept
