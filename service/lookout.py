"""Which queue an API process gives its requests to: the choice among the workers that have announced themselves.

A part of the composition root. It knows neither Redis nor HTTP. A worker fits when it computes what this process's
model folder says; the folder may lack the weights, then any weights do, and the first choice is kept.
"""

from collections import Counter
from collections.abc import Sequence

from model.fingerprint import Fingerprint
from service.broker.redis import PROTOCOL, WorkerInfo

NO_WORKER = "no worker is alive; start one with: millrace worker --redis-url ... --model ..."


class Lookout:
    """`chosen` is None until a worker fitted for the first time. It stays when the worker goes, since requests may wait
    for the next one, until workers of another queue fit. `dtype` may be `auto` and `quantize`
    None: whatever the workers compute in."""

    def __init__(self, own: Fingerprint, dtype: str, quantize: str | None = None) -> None:
        self._own, self._dtype, self._quantize = own, dtype, quantize
        self.chosen: WorkerInfo | None = None
        self.complaint: str | None = NO_WORKER  # why no worker that lives fits; None if one does
        self.num_fitting = 0  # workers of the chosen queue

    def see(self, workers: Sequence[WorkerInfo]) -> None:
        """Choose again, given the workers that live now."""
        fitting = [worker for worker in workers if not self._differences(worker)]
        queues = Counter(worker.queue for worker in fitting)
        if queues and (self.chosen is None or self.chosen.queue not in queues):
            most = max(queues, key=lambda queue: (queues[queue], queue))  # every API process decides alike
            self.chosen = next(worker for worker in fitting if worker.queue == most)
        self.num_fitting = queues[self.chosen.queue] if self.chosen else 0
        self.complaint = None if queues else self._misfit(workers)

    def _misfit(self, workers: Sequence[WorkerInfo]) -> str:
        if not workers:
            return NO_WORKER
        closest = min(map(self._differences, workers), key=len)
        alive = f"{len(workers)} workers are alive, none" if len(workers) > 1 else "1 worker is alive, but not one"
        return f"{alive} of the model that is served here: {', '.join(closest)}"

    def _differences(self, worker: WorkerInfo) -> list[str]:
        """What a worker computes otherwise, in words."""
        found = []
        if worker.protocol != PROTOCOL:
            found.append(f"it speaks protocol {worker.protocol}, not {PROTOCOL}: run the same version of millrace")
        if worker.door != self._own.door:
            found.append("its config or tokenizer differs")
        if self._own.weights not in (None, worker.weights):
            found.append("its weights differ")
        dtype, _, quantize = worker.dtype.partition("-")
        if self._dtype not in ("auto", dtype):
            found.append(f"its dtype is {dtype}, not {self._dtype}")
        if self._quantize not in (None, quantize or "none"):
            found.append(f"its --quantize is {quantize or 'none'}, not {self._quantize}")
        return found
