"""Processes and launching, errors, the files of a run, the console: what every other room uses."""

from recipelib.runtime.checkpoints import (
    TRAINED,
    check_adapter,
    check_trained,
    checkpoint_kind,
    clear_figures,
    clear_results,
    clear_way,
    find_checkpoint,
    is_whole,
    refuse_trained_run,
)
from recipelib.runtime.console import (
    is_main_process,
    print_table,
    printable,
    progress_bar,
    say,
)
from recipelib.runtime.errors import UserError, first_line, one_line, require_at_least
from recipelib.runtime.files import (
    Spool,
    load_yaml,
    read_metrics,
    replacing,
    write_json,
    write_jsonl,
)
from recipelib.runtime.installed import versions
from recipelib.runtime.launch import (
    check_joined,
    cores,
    end_process_group,
    fsdp_option,
    join_on_cpu,
    use_all_cores,
    uses_fsdp,
)
from recipelib.runtime.memory import MemoryMeter, gib
from recipelib.runtime.prepared import ArrowFile, Store, code_digest, cut, digest, read_arrow

__all__ = [
    "TRAINED",
    "ArrowFile",
    "MemoryMeter",
    "Spool",
    "Store",
    "UserError",
    "check_adapter",
    "check_joined",
    "check_trained",
    "checkpoint_kind",
    "clear_figures",
    "clear_results",
    "clear_way",
    "code_digest",
    "cores",
    "cut",
    "digest",
    "end_process_group",
    "find_checkpoint",
    "first_line",
    "fsdp_option",
    "gib",
    "is_main_process",
    "is_whole",
    "join_on_cpu",
    "load_yaml",
    "one_line",
    "print_table",
    "printable",
    "progress_bar",
    "read_arrow",
    "read_metrics",
    "refuse_trained_run",
    "replacing",
    "require_at_least",
    "say",
    "use_all_cores",
    "uses_fsdp",
    "versions",
    "write_json",
    "write_jsonl",
]
