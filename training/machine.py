"""What a run stands on: its processes, its device, its precision; and how it is stopped.

    with running("train.py"):                       # ends with a sentence, not with a traceback
        machine = set_up(device="", precision="")   # joins the other processes, if there are any
        with machine.autocast():
            ...
        machine.say("printed once, by the first process")

torchrun, OpenMPI's mpirun and SLURM's srun are understood. Without them a process runs alone.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from storage import disk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Launcher -> the variables in which it tells a process its rank, the number of processes, its rank
# on its node, and the number of processes on its node.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}

# How long processes wait for each other to start.
MEETING = timedelta(minutes=10)
# How long they wait for each other then. One of them may count the tokens of 60 million captions
# before training starts, which takes longer than the ten minutes that NCCL would wait.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Machine:
    """This process's place among the others, and what it computes on."""
    rank: int                   # 0 .. world - 1; process 0 prints and writes
    world: int                  # number of processes
    device: torch.device
    precision: str              # fp32, bf16 or fp16, of matrix products
    messages: object = None     # process group for numbers that stay on the CPU; None: alone
    tensor: int = 1             # processes that hold one model together (training/parallel.py)
    mesh: object = None         # DeviceMesh of "data" x "tensor", where tensor is above 1

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this process sees; those that share a model share it."""
        return self.rank // self.tensor

    @property
    def data_world(self) -> int:
        """The number of parts that a global batch is cut into."""
        return self.world // self.tensor

    def say(self, *words: object, **how: object) -> None:
        """Prints, in the first process only."""
        if self.rank == 0:
            print(*words, **how, flush=True)

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision],
                              enabled=self.precision != "fp32")

    def no_autocast(self) -> torch.autocast:
        """The context in which the backward pass runs: each operation as its forward one did."""
        return torch.autocast(self.device.type, enabled=False)

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.world > 1:
            dist.barrier()

    def largest(self, number: int) -> int:
        """The largest number that any process names; every one must ask.

        It travels between CPUs: the GPU is not waited for. A process that died is noticed here.
        """
        if self.world == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.messages)
        return int(numbers)

    def union(self, part: dict) -> dict:
        """The union of the dicts of all processes, on each of them."""
        if self.world == 1:
            return part
        parts = [None] * self.world
        dist.all_gather_object(parts, part)
        whole = {}
        for some in parts:
            whole.update(some)
        return whole


def find_ranks(env: dict) -> tuple[int, int, int]:
    """(rank, number of processes, rank on this node) from a launcher's variables; else (0, 1, 0).

    SLURM sets its variables in every shell of an allocation, also where nothing was started by
    srun. So they count only inside a step, which srun alone opens.
    ValueError where a launcher's variables are incomplete: each process would train alone, over the
    others' files.
    """
    for launcher, (rank, world, local_rank, _) in LAUNCHERS.items():
        if launcher == "srun" and "SLURM_STEP_ID" not in env:
            if int(env.get(world, 1)) > 1:
                print(f"{world} is {env[world]}, but srun did not start this process: "
                      "it runs alone", file=sys.stderr)
            continue
        missing = [name for name in (rank, world, local_rank) if name not in env]
        if not missing:
            return int(env[rank]), int(env[world]), int(env[local_rank])
        several = int(env.get(world, 1)) > 1
        if rank in env or several:
            raise ValueError(f"{', '.join(missing)} is not set: {launcher} sets "
                             f"{rank}, {world} and {local_rank}")
    return 0, 1, 0


def on_one_node(env: dict, world: int) -> bool:
    """Whether all processes run on this machine, as far as their launcher tells."""
    if int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1) > 1:
        return False
    for *_, local_world in LAUNCHERS.values():
        if env.get(local_world, "").isdecimal():
            return int(env[local_world]) >= world
    return True


def set_up(device: str = "", precision: str = "", tensor: int = 1) -> Machine:
    """Joins the process group, if there are several processes -> Machine.

    device: cpu, cuda, cuda:1, …; "" is a GPU where there is one. precision: see `choose_precision`.
    tensor: number of processes that hold one model together.
    ValueError, with a message for users, for settings that do not work here.
    """
    rank, world, local_rank = find_ranks(os.environ)
    if tensor < 1 or world % tensor:
        raise ValueError(f"--tensor-parallel {tensor}: {world} processes do not divide into groups "
                         f"of {tensor} (torchrun, mpirun or srun starts several)")
    device = find_device(device, world, local_rank)
    precision = choose_precision(precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    choose_kernels(precision)
    if world > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ and not on_one_node(os.environ, world):
            raise ValueError("MASTER_ADDR is not set: with several nodes, every process must be "
                             "told the address of the first one, and MASTER_PORT, a free port "
                             "there")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        on_gpu = device.type == "cuda"
        try:
            store, *_ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ValueError(f"the processes could not meet at {place}: another run may be there "
                             f"(MASTER_PORT chooses another port), or one did not start "
                             f"({disk.shortened(error)})") from None
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world,
                                store=store, timeout=TIMEOUT, device_id=device if on_gpu else None)
    messages = dist.new_group(backend="gloo", timeout=TIMEOUT) if world > 1 else None
    mesh = None
    if tensor > 1:
        mesh = init_device_mesh(device.type, (world // tensor, tensor),
                                mesh_dim_names=("data", "tensor"))
    return Machine(rank, world, device, precision, messages, tensor, mesh)


def choose_kernels(precision: str) -> None:
    """Which kernels torch may use on a GPU, for all that this process computes.

    fp32 means fp32, in convolutions too. Beside half precision, the few float32 products that are
    left may use TF32. cuDNN's attention is left out: it makes a plan for each new shape, and its
    gradients can be NaN where there is a mask (pytorch/pytorch#196678).
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.enable_cudnn_sdp(False)


# -------------------------------------------------------------------------------------------------
# How a run ends before its end.

@contextmanager
def running(command: str) -> Iterator[None]:
    """Runs a command; what goes wrong becomes one sentence (disk.command); leaves the processes.

    Where another process ended first, the sentence names it.
    """
    with disk.command(command):
        try:
            yield
        except torch.OutOfMemoryError:
            less = "a smaller --batch-size takes less"
            raise ValueError(f"the GPU's memory was full: {less}") from None
        except RuntimeError as error:
            if not dist.is_initialized():
                raise
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            gone = lost_processes()
            print(f"{command}: {gone} ended, so this one cannot go on (what happened there is told "
                  "there)", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)             # leaving the group would wait for who is gone
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def lost_processes(patience: float = 5.0) -> str:
    """The processes that do not answer within some seconds, by their ranks, in words."""
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [other for other in range(world) if other != rank]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{rank}", "")
        end = time.monotonic() + patience
        while others and time.monotonic() < end:
            others = [other for other in others if not store.check([f"alive/{other}"])]
            time.sleep(0.1)
    except (RuntimeError, ValueError):      # who is gone kept the store: the first process
        others = [0] if rank else others
    if not others:
        return f"one of the {world} processes"
    ranks = ", ".join(map(str, others))
    return f"process{'es' if len(others) > 1 else ''} {ranks} of 0 … {world - 1}"


class Signals:
    """What asks a run to stop: SIGTERM (pre-emption), SIGUSR1 (SLURM's warning), SIGINT (Ctrl-C).

    Before training has begun it stops at once. Then, with `training` set, the first signal is only
    noted in `asked`, so that the loop can finish its step and save. A second one stops at once, if
    it comes a second later: launchers repeat the first one.
    """
    WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT")
                    if hasattr(signal, name))           # Windows has no SIGUSR1

    def __enter__(self) -> "Signals":
        self.training, self.asked, self.since = False, 0, 0.0
        self.before = {}
        for number in self.WATCHED:
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:              # not the main thread: signals go elsewhere
                break
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if not self.training:
            print(f"stopped by {signal.Signals(number).name} before training began",
                  file=sys.stderr)
            sys.exit(128 + number)
        if not self.asked:
            self.asked, self.since = number, time.monotonic()
            return
        if time.monotonic() - self.since > 1:
            os._exit(128 + number)


def ignore_signals(worker: int = 0) -> None:
    """For data-loading processes, which end when the process that they load for ends."""
    for number in Signals.WATCHED:
        signal.signal(number, signal.SIG_IGN)


def find_device(asked: str, world: int, local_rank: int) -> torch.device:
    """The device of this process: what was asked for, else its GPU, else the CPU."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {asked}: cpu or cuda is expected") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {asked}: cpu or cuda is expected")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {asked}: there is no GPU here that torch can use")
    if device.index is None:
        return torch.device("cuda", local_rank)
    if world > 1:
        raise ValueError(f"--device {asked}: {world} processes have a GPU each; say --device cuda "
                         "(CUDA_VISIBLE_DEVICES chooses among the GPUs)")
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {asked}: there are {torch.cuda.device_count()} GPUs here")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: what was asked for, else the fastest that the device does well."""
    if asked:
        if asked not in DTYPES:
            raise ValueError(f"--precision {asked}: one of {', '.join(DTYPES)} is expected")
        return asked
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def loader_workers(asked: int, device: torch.device) -> int:
    """Number of data-loading processes beside this one; asked < 0: chosen by the device.

    A CPU run has none: they would take the model's cores. A GPU gets its share, at most sixteen, to
    validate and evaluate. (In training it gets what it needs: loading.workers_needed.)
    """
    if asked >= 0:
        return asked
    return 0 if device.type == "cpu" else min(16, core_share())


def core_share() -> int:
    """The cores that a GPU's process may use for loading: its share but two, and at least one.

    Two are left to the process itself and to what pins its batches. Those that this process may run
    on count, not all that the machine has.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // max(1, torch.cuda.device_count()) - 2)


def memory_gb(device: torch.device) -> float:
    """GB (2^30 bytes): the GPU's peak; on a CPU, what this process holds now.

    Where the system does not tell that, the process's peak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    except OSError:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return peak / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def forget_peak(device: torch.device) -> None:
    """Starts to measure peak_memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):                 # Linux alone can
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held since forget_peak: the GPU's tensors, or this process.

    Where the system forgets no peak, it is that of the process's whole life.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return 1024 * int(peak)
    except (OSError, ValueError):
        return int(2 ** 30 * memory_gb(device))
