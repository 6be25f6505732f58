"""A process that kills itself at a chosen moment; imports nothing that takes long."""

import os
import signal
import sys


def kill_at_event(folder, number):
    """kill -9 at the given one of the process's openings, makings, renamings and deletions under a folder."""
    events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")
    seen = [0]

    def watch(event, arguments):
        if event in events and any(str(folder) in str(argument) for argument in arguments):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return seen
