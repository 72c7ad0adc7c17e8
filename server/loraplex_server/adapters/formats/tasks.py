"""Adapters of several tasks: which of them is served."""

from __future__ import annotations

from typing import Final

from loraplex_server.adapters.formats.config_fields import ConfigFields

#: Our own field of `adapter_config.json`; PEFT's forward takes `task_ids` instead.
FIELD: Final = "loraplex_task"


def read_task(fields: ConfigFields, num_tasks: int, count_field: str) -> int:
    """Return the task that the uploader chose, which is 0 where there is only one.

    Args:
        count_field: PEFT's name of `num_tasks`.
    """
    value = fields.raw(FIELD)
    if value is None and num_tasks == 1:
        return 0
    if type(value) is int and 0 <= value < num_tasks:
        return value
    fields.refuse(
        FIELD,
        f"{count_field} is {num_tasks} and a request cannot choose among tasks; write the one to "
        f"serve, 0 to {num_tasks - 1}, into {FIELD} of adapter_config.json, and upload the folder "
        "once for each task",
    )
    return 0
