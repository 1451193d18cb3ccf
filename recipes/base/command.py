"""What the command lines of all recipes share."""

import gc
import logging
import os
import platform
import sys
from collections.abc import Callable

import torch
import transformers
from accelerate import PartialState

from growlib import GrowError

STOPPED = 130  # what a shell expects of a program that Ctrl-C ended
KEPT = "The same command goes on where it was: finished trainings are kept."


def say(line: str) -> None:
    """Print once, however many processes there are."""
    if PartialState().is_main_process:
        print(line, flush=True)


def counted(number: str | int, one: str, several: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else several}"


def environment() -> dict[str, str | int]:
    """What a result ran on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
    }


def machine() -> str:
    """What a recipe runs on: a launcher may have started fewer processes than one thinks."""
    found = environment()
    processes = counted(found["processes"], "process", "processes")
    return f"{processes} of {counted(found['threads'], 'thread', 'threads')}, {found['device']}."


def guarded(work: Callable[[], None], when_stopped: str = KEPT) -> int:
    """Do the work; the exit code. What the user can mend is said in one line, and what Ctrl-C leaves."""
    logging.getLogger("growlib").setLevel(logging.ERROR)  # an inexact growth stands in the report
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; the long parts have their own
    processes = PartialState(cpu=not torch.accelerator.is_available())  # those that torchrun or accelerate started
    say(machine())
    try:
        work()
        gc.collect()  # what still holds the process group, before it goes
        processes.wait_for_everyone()  # one that leaves while another still talks to it is aborted
        processes.destroy_process_group()
    except GrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. {when_stopped}", file=sys.stderr)
        return STOPPED
    return 0
