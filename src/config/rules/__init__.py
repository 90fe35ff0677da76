"""Rules across sections and against the file system: generators over a typed config that yield problems.

A rule's parameters name the sections it reads; the gate calls it when these sections are good in themselves.
"""

from src.config.rules import across, checkpoint, data, deepspeed, patterns, within
from src.config.rules.rule import RULES
