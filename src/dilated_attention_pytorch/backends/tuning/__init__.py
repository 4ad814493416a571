"""What measurements say about the choice of a backend: a table, its file, and a cheap lookup.

A table ranks (backend, plan, options) for each key; `select` takes the first that has no reason against it. A table
changes how soon a result comes, never the result beyond the contract's limits. `dilated-attention tune` measures one.
"""

from dilated_attention_pytorch.backends.tuning.files import load_table, ranking, tables_in_force, user_file, using
from dilated_attention_pytorch.backends.tuning.keys import (
    PATTERN_CLASSES,
    Key,
    device_name,
    key_of,
    pattern_class,
    processor_name,
)
from dilated_attention_pytorch.backends.tuning.table import (
    Choice,
    Measured,
    Ranking,
    Table,
    Timing,
    read_options,
    table_from_dict,
)

__all__ = [
    "PATTERN_CLASSES",
    "Choice",
    "Key",
    "Measured",
    "Ranking",
    "Table",
    "Timing",
    "device_name",
    "key_of",
    "load_table",
    "pattern_class",
    "processor_name",
    "ranking",
    "read_options",
    "table_from_dict",
    "tables_in_force",
    "user_file",
    "using",
]
