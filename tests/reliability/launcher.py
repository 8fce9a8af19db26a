"""`featcache` commands as real processes that start in a moment: forks of one that has imported.

Reads one JSON line per command from standard input ({"arguments", "environment", "error"}) and
answers with its process id, then, when the command ends, with its id and exit code. Workers are
forked too. Not for users: a fork of a program with threads is a gamble; here none runs yet.
"""

import json
import os
import sys
import threading

import dask
import distributed
import timm
import torch
import transformers

import featcache.cluster
import featcache.extract.command
import featcache.extract.repair
from featcache.cli import main

IMPORTED = (distributed, timm, torch, transformers, featcache)


def run(order):
    os.setsid()
    error = os.open(order["error"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(error, 1)
    os.dup2(error, 2)
    os.environ.update(order["environment"])
    dask.config.refresh()
    dask.config.set({"distributed.worker.multiprocessing-method": "fork"})
    torch.set_num_threads(1)
    code = main(order["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking all those modules apart costs a second


def report(pid):
    _, status = os.waitpid(pid, 0)
    sys.stdout.write(json.dumps([pid, os.waitstatus_to_exitcode(status)]) + "\n")
    sys.stdout.flush()


def serve():
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        sys.stdout.write(json.dumps([pid, None]) + "\n")
        sys.stdout.flush()
        threading.Thread(target=report, args=(pid,), daemon=True).start()


serve()
