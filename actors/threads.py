"""How many threads a worker process uses."""

import torch


def use_one_thread_on_cpu() -> None:
    """Let torch compute with one thread, unless there is a GPU.

    Ray starts one worker per core. Workers that each use all cores only wait for each other.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
