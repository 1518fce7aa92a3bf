"""Decode steps that are recorded once and played again: on a GPU as CUDA graphs, one launch in place of hundreds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adsa import KVCache
from autoregressive.models.gpt import Transformer

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], Any]]]


class CudaRecorder:
    """Records as CUDA graphs, which share their memory: no two are played at once.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool = device, None

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Any]]:
        """Record a step and play it once.

        Returns:
            Its result, which lasts until the next step is played, and what plays it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            result = step()
        self.pool = self.pool or graph.pool()
        graph.replay()
        return result, graph.replay


class RecordedSteps:
    """The decode steps of a model with one cache, each :meth:`phase <adsa.KVCache.phase>` recorded once.

    The first step of a phase runs as usual, the second is recorded, all others are played. They serve any number of
    batches, with ``kv.reset()`` between these.

    Args:
        model: in eval mode; on a CUDA device, unless there is another recorder.
        kv: from :func:`~autoregressive.models.generate.new_cache` with ``fixed=True``.
        recorder: runs a step and returns its result and what plays it again; None: :class:`CudaRecorder`.

    Raises:
        ValueError: for a cache that isn't fixed; for a model that is not on a CUDA device.
    """

    def __init__(self, model: Transformer, kv: KVCache, recorder: Recorder | None = None):
        device = model.tok_embeddings.weight.device
        if recorder is None and device.type != "cuda":
            raise ValueError(f"decode steps are recorded as CUDA graphs, and the model is on the device {device}")
        if not kv.fixed:
            raise ValueError("steps can be recorded of a fixed cache alone: make it by new_cache(..., fixed=True)")
        self.model, self.kv, self._record = model, kv, recorder or CudaRecorder(device)
        self._steps: dict[tuple, _Step | None] = {}

    def __call__(self, *, idx: Tensor, input_pos: Tensor, cache: KVCache) -> tuple[Tensor, None]:
        """As the model's, for one image token. The logits last until the next step."""
        if cache is not self.kv:
            raise ValueError("these steps were recorded for another cache")
        phase = cache.phase()
        if phase not in self._steps:
            if phase is not None:
                self._steps[phase] = None
            return self.model(idx=idx, input_pos=input_pos, cache=cache)
        step = self._steps[phase]
        if step is None:
            step = self._steps[phase] = _Step(self.model, cache, idx, input_pos, self._record)
        else:
            step.play(idx, input_pos)
            cache.tick()
        return step.logits, None


class _Step:
    def __init__(self, model: Transformer, kv: KVCache, idx: Tensor, input_pos: Tensor, record: Recorder):
        self._idx, self._input_pos = idx.clone(), input_pos.clone()
        self.logits, self._play = record(
            lambda: model(idx=self._idx, input_pos=self._input_pos, cache=kv)[0],
        )

    def play(self, idx: Tensor, input_pos: Tensor) -> None:
        self._idx.copy_(idx)
        self._input_pos.copy_(input_pos)
        self._play()
