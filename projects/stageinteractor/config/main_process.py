"""What one process of a run does for all of them."""

from collections.abc import Callable
from typing import Any

from detectron2.utils import comm

from ..errors import UserError


def in_main_process(call: Callable[[], Any]) -> Any:
    """Call a function in the main process and return its result on all ranks.

    Raises:
        UserError: the function raised it; all ranks raise the same.
    """
    result, problem = None, ""
    if comm.is_main_process():
        try:
            result = call()
        except UserError as error:
            problem = str(error)
    result, problem = comm.all_gather((result, problem))[0]
    if problem:
        raise UserError(problem)
    return result
