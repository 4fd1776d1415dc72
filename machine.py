"""Processes, devices and precision: what a run stands on."""

import os
from pathlib import Path

import torch
import torch.distributed as dist


def find_ranks(env):
    """(rank, world size, local rank) from what torchrun, OpenMPI's mpirun or SLURM's srun set; alone: (0, 1, 0).

    ValueError where one of them is set and another missing: each process would train alone, over the others' files.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"),
                  ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
                  ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        there = [name in env for name in names]
        if all(there):
            return tuple(int(env[name]) for name in names)
        if all(there[:2]) and int(env[names[1]]) > 1 or there[0] != there[1]:
            missing = [name for name, is_there in zip(names, there) if not is_there]
            raise ValueError(f"{', '.join(missing)} is not set, though {names[there.index(True)]} is: a launcher sets all of "
                             f"{', '.join(names)}")
    return 0, 1, 0


def set_up(settings):
    """Joins the process group, if there are several processes -> (rank, world size, device)."""
    rank, world, local_rank = find_ranks(os.environ)
    try:
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {settings.device}: cpu or cuda is expected") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: there is no GPU here that torch can use")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")       # several nodes: the launcher or the user sets both
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return rank, world, device


def choose_precision(settings, device):
    """fp32, bf16 or fp16: what was asked for, else the fastest that the device does well."""
    if settings.precision not in ("", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision {settings.precision!r}: one of fp32, bf16, fp16 is expected")
    if settings.precision == "fp16" and device.type != "cuda":
        raise ValueError("precision fp16 needs a GPU; bf16 and fp32 run everywhere")
    if settings.precision:
        return settings.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def memory_gb(device):
    """The GPU's peak memory; on a CPU, what this process holds now (its peak, where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def loader_workers(settings, device):
    if settings.workers >= 0:
        return settings.workers
    return min(8, max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()))) if device.type == "cuda" else 0
