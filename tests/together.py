"""Runs train.py or eval.py on several processes, many times, and imports everything once.

The imports are most of a short run's time. Each line that it reads is a job, {"script",
"arguments", "processes", "port", "log"}. It forks as many processes, each with the variables that
mpirun sets, and prints the largest of their exit codes.
"""

import json
import os
import sys

import torch._dynamo    # noqa: F401

import eval as evaluation
import train

SCRIPTS = {"train": train, "eval": evaluation}


def be_process(rank, job):
    """One process of a job, to its end."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["MASTER_PORT"] = str(job["port"])
    for name, value in (("RANK", rank), ("SIZE", job["processes"]), ("LOCAL_RANK", rank)):
        os.environ[f"OMPI_COMM_WORLD_{name}"] = str(value)
    SCRIPTS[job["script"]].main(job["arguments"])
    sys.exit()


def serve():
    for line in sys.stdin:
        job, children = json.loads(line), []
        for rank in range(job["processes"]):
            child = os.fork()
            if child == 0:
                be_process(rank, job)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(max(map(abs, codes)), flush=True)


if __name__ == "__main__":
    serve()
