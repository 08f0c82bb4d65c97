"""A worker on a cluster of Ray: an actor on each of its hosts starts its processes, and a thread here watches them."""

import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.engines.job import RESTART, Job
from launch.ray_process import Process
from lowrank.core.errors import plural
from lowrank.memory import devices, tpus

POLL = 0.5  # seconds between two looks at the processes
TOGETHER = 60.0  # seconds in which the processes of a worker end after the first of them


class Host(NamedTuple):
    """What a worker takes of one host."""

    cpus: int
    gpus: int = 0
    tpus: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """The bundle of a placement group."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "TPU": self.tpus}
        return {name: float(count) for name, count in named.items() if count}


def hosts(job: Job, cpus: int) -> list[Host]:
    """What a worker of the job takes, host by host."""
    if job.topology:
        each = tpus.hosts(job.topology)
        return [Host(cpus, tpus=tpus.chips(job.topology) // each)] * (job.slices * each)
    gpus = devices.parse_device(job.device).num_devices if job.device else 0
    return [Host(cpus, gpus)] * job.hosts


class RayWorker:
    """A worker: it is started on free hosts, and again when it was stopped, has lost a host or has failed."""

    def __init__(self, job: Job, index: int, cpus: int):
        """The worker of a job with an index. Nothing is started before `run`."""
        self._job, self._name, self._hosts = job, job.worker_name(index), hosts(job, cpus)
        self._lines: list[str] = []
        self._stop, self._kill = threading.Event(), threading.Event()

    def stop(self, kill: bool = False) -> None:
        """Asks the worker to stop, which lets its cell save, or kills it."""
        self._stop.set()
        if kill:
            self._kill.set()

    def take_lines(self) -> list[str]:
        """What there is to say since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def run(self) -> None:
        """Starts the worker until it ends for good."""
        try:
            self._run()
        except Exception as e:  # of Ray; a thread that ends silently would look like a worker that is done
            self._lines.append(f"error: {self._name} is given up: {type(e).__name__}: {str(e).splitlines()[0]}")

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            code, what = self._run_once()
            if code == 0:
                return
            failures += code not in (None, RESTART)
            if self._stop.is_set():
                return
            if failures > self._job.max_restarts:
                self._lines.append(f"error: {self._name} has failed {plural(failures, 'time')} and is given up: {what}")
                return
            self._lines.append(f"{self._name} is started again: {what}")

    def _run_once(self) -> tuple[int | None, str]:
        """`(exit code, what has happened)`; the code is None if a host was lost, or if none was found in time."""
        import ray

        processes: list[Any] = []
        group, remove = self._reserve()
        if group is None:
            return None, "it was stopped before its resources were free"
        try:
            processes = self._place(group)
            return self._watch(processes)
        except (ray.exceptions.RayError, TimeoutError) as e:
            return None, f"a host was lost: {str(e).splitlines()[0]}"
        finally:
            for process in processes:
                _ignore_lost(process.kill.remote())
                ray.kill(process)
            remove()

    def _reserve(self) -> tuple[Any, Any]:
        """`(placement group, function that removes it)` once the resources are free; `(None, None)` after a stop."""
        from ray.util.placement_group import placement_group, remove_placement_group

        while not self._stop.is_set():
            if self._job.topology and tpus.hosts(self._job.topology) > 1:
                try:
                    whole = _reserve_slices(self._job, self._hosts[0])
                except TimeoutError:
                    continue
                group, remove = whole.placement_group, whole.shutdown
            else:
                strategy = "STRICT_SPREAD" if len(self._hosts) > 1 else "PACK"
                group = placement_group([host.resources for host in self._hosts], strategy=strategy)
                remove = lambda group=group: remove_placement_group(group)  # noqa: E731
            while not self._stop.is_set():
                if group.wait(timeout_seconds=1):
                    return group, remove
            remove()
        return None, None

    def _place(self, group: Any) -> list[Any]:
        """Starts the processes of the worker; returns their actors, the first one's first."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actors = []
        for i, host in enumerate(self._hosts):
            place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i)
            options = {
                "num_cpus": host.cpus,
                "num_gpus": host.gpus,
                "resources": {"TPU": host.tpus} if host.tpus else {},
            }
            actors.append(ray.remote(Process).options(scheduling_strategy=place, max_restarts=0, **options).remote())
        places = ray.get([actor.place.remote() for actor in actors])
        order = self._order([index for _, index in places])
        actors, coordinator = [actors[i] for i in order], places[order[0]][0]
        logs = ray.get([self._start(actor, i, coordinator) for i, actor in enumerate(actors)])
        host = coordinator.partition(":")[0]
        self._lines.append(f"{self._name} runs; its log is {logs[0]} on {host}")
        return actors

    def _order(self, indices: Sequence[int | None]) -> list[int]:
        """The bundles in the order of the processes: slice by slice, each in the order of its hosts."""
        each = len(indices) // self._job.slices
        if not self._job.topology or each == 1:
            return list(range(len(indices)))
        return sorted(range(len(indices)), key=lambda i: (i // each, i if indices[i] is None else indices[i]))

    def _start(self, actor: Any, index: int, coordinator: str) -> Any:
        count, environment = len(self._hosts), dict(self._job.environment)
        words = list(self._job.command)
        if count > 1:
            words += [f"--group={self._name}", f"--process={index}"]
        if count > 1 and not self._job.topology:  # JAX finds the hosts of TPU slices, and no others under Ray
            environment |= {"JAX_COORDINATOR_ADDRESS": coordinator}
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        return actor.start.remote(self._name, words, environment)

    def _watch(self, actors: Sequence[Any]) -> tuple[int, str]:
        """`(exit code of the first process, or of the first that failed, what it has said last)`."""
        import ray

        give_up, asked = float("inf"), False
        while True:
            codes = ray.get([actor.poll.remote() for actor in actors], timeout=TOGETHER)
            ended = [(i, code) for i, code in enumerate(codes) if code is not None]
            if ended and give_up == float("inf"):
                give_up = time.monotonic() + TOGETHER
            if len(ended) == len(codes) or time.monotonic() > give_up or self._kill.is_set():
                break
            if self._stop.is_set() and not asked:
                asked = True
                ray.get([actor.stop.remote() for actor in actors], timeout=TOGETHER)
            time.sleep(POLL)
        i, code = next(
            ((i, code) for i, code in ended if code not in (0, RESTART)), ended[0] if ended else (0, RESTART)
        )
        line = ray.get(actors[i].last_line.remote(), timeout=TOGETHER)
        return code, f"process {i} ended with exit code {code}: {line}"


def _reserve_slices(job: Job, host: Host) -> Any:
    """Ray's reservation of the worker's TPU slices, each of which is one physical slice."""
    from ray.util.tpu import slice_placement_group

    return slice_placement_group(
        topology=job.topology.partition(":")[2],
        accelerator_version=job.tpu.accelerator,
        resources_per_bundle=host.resources,
        num_slices=job.slices,
        chips_per_vm=tpus.HOST_CHIPS,
        strategy="STRICT_SPREAD",
        head_reservation_timeout_s=5.0,
    )


def _ignore_lost(reference: Any) -> None:
    """Waits for a call on an actor, which may be dead."""
    import ray

    try:
        ray.get(reference, timeout=5)
    except (ray.exceptions.RayError, TimeoutError):
        return
