"""The parts that the trainers share."""

import argparse
import json
import math
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoregressive.train import training
from autoregressive.train.training import (
    Ema,
    JsonLog,
    Muon,
    StepSampler,
    StopSignal,
    TrainingError,
    add_training_flags,
    build_accelerator,
    build_optimizer,
    learning_rate,
    load_latest_checkpoint,
    orthogonalize,
    save_checkpoint,
    seed_step,
    swapped_weights,
    total_steps,
)


def batches(count, **kwargs):
    stream = iter(StepSampler(**{"images": 10, "global_batch": 4, "seed": 1, "start_step": 0, **kwargs}))
    return [next(stream) for _ in range(count)]


def test_every_epoch_sees_every_image_once():
    stream = [key for batch in batches(5) for key in batch]
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10
    for epoch in (0, 1):
        assert sorted(index for e, index in stream if e == epoch) == list(range(10))
    assert [i for _, i in stream[:10]] != [i for _, i in stream[10:]]


def test_order_does_not_depend_on_interruptions_or_processes():
    whole = batches(6)
    assert batches(3, start_step=3) == whole[3:]
    halves = zip(batches(6, rank=0, world=2), batches(6, rank=1, world=2), strict=True)
    assert [a + b for a, b in halves] == whole
    assert batches(6, seed=2) != whole


def test_learning_rate():
    args = SimpleNamespace(lr=1.0, lr_min=0.1, warmup_steps=4, lr_schedule="cosine")
    assert [learning_rate(step, args, 104) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(54, args, 104) == pytest.approx(0.55)
    assert learning_rate(104, args, 104) == pytest.approx(0.1)
    args.lr_schedule = "constant"
    assert learning_rate(1000, args, 104) == 1.0


def test_steps_and_impossible_batches():
    parser = argparse.ArgumentParser()
    add_training_flags(parser, epochs=3)
    args = parser.parse_args(["--global-batch-size", "4", "--mixed-precision", "none"])
    assert total_steps(args, 10) == 8  # 30 images
    args.max_steps = 5
    assert total_steps(args, 10) == 5
    args.gradient_accumulation_steps = 3
    with pytest.raises(TrainingError, match="not a multiple"):
        build_accelerator(args)


def test_ema_averages_parameters_and_copies_the_rest():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.running_mean.fill_(7.0)
    for _ in range(10):
        ema.update(model)
    # (1 + t) / (10 + t) stays below 0.5 until t = 8
    left = math.prod(min(0.5, (1 + t) / (10 + t)) for t in range(1, 11))
    torch.testing.assert_close(ema.weights["weight"], torch.full((2,), 3 - 2 * left))
    assert ema.weights["running_mean"].tolist() == [7, 7]
    with swapped_weights(model, ema.weights):
        assert model.weight[0] != 3
    assert model.weight.tolist() == [3, 3]


def test_decay_is_for_matrices_only():
    args = SimpleNamespace(lr=1.0, beta1=0.9, beta2=0.95, weight_decay=0.3)
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    groups = build_optimizer(nn.ModuleList([model, nn.Linear(2, 2)]), args).param_groups
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups] == [(0.3, [2]), (0.0, [1] * 4)]


def test_muon_takes_orthogonal_steps():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (48, 16)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert singular.min() > 0.5 and singular.max() < 1.3
    weight = nn.Parameter(torch.zeros(16, 48))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.randn(16, 48)
    optimizer.step()
    # the size of an AdamW step: every entry about 0.2 lr
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)
    assert (weight * weight.grad).sum() < 0


def test_muon_serves_inner_matrices_and_adamw_the_rest():
    args = SimpleNamespace(lr=1.0, beta1=0.9, beta2=0.95, weight_decay=0.3, optimizer="muon")
    model = nn.ModuleDict({"layers": nn.Linear(2, 3), "output": nn.Linear(3, 4)})
    optimizer = build_optimizer(model, args, inner=lambda name: name.startswith("layers."))
    adamw, muon = optimizer.optimizers
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(3, 2)]
    assert sorted(tuple(p.shape) for g in adamw.param_groups for p in g["params"]) == [(3,), (4,), (4, 3)]


def test_seeds_depend_on_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*key)) for key in ((0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1))}) == 4


def test_checkpoints_are_pruned_and_a_damaged_one_is_named(tmp_path):
    assert load_latest_checkpoint(tmp_path / "absent") is None
    for steps in (1, 2, 10):
        save_checkpoint(tmp_path, steps, {"model": {"w": torch.tensor(steps)}}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000002.pt", "0000010.pt"]
    assert load_latest_checkpoint(tmp_path)["steps"] == 10
    (tmp_path / "0000010.pt").write_bytes((tmp_path / "0000010.pt").read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"0000010\.pt.*delete it"):
        load_latest_checkpoint(tmp_path)


def test_a_resumed_log_drops_what_will_be_logged_again(tmp_path):
    path, main_process = tmp_path / "log.jsonl", SimpleNamespace(is_main_process=True)
    log = JsonLog(path, main_process, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=torch.tensor(0.5))
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    JsonLog(path, main_process, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
    ]


@contextmanager
def full_disk():
    """A limit on the size of files stands for it: the system refuses in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_costs_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(1)}}, keep=1)
    with full_disk(), pytest.raises(TrainingError, match=r"0000002\.pt can't be written \(File too large\). Make room"):
        save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(1 << 16)}}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.pt"]

    log, main_process = tmp_path / "log.jsonl", SimpleNamespace(is_main_process=True)
    written = "".join(json.dumps({"step": step, "text": "x" * 1000}) + "\n" for step in range(100))
    log.write_text(written)
    with full_disk(), pytest.raises(TrainingError, match=r"log\.jsonl can't be written"):
        JsonLog(log, main_process, 50)
    assert log.read_text() == written
    with full_disk(), pytest.raises(TrainingError, match=r"log\.jsonl can't be written"):
        JsonLog(log, main_process, 10).write(step=11, text="x" * (1 << 15))


@pytest.mark.parametrize(("seconds", "asked"), [(3.0, 200), (0.3, 67), (0.02, 5)])
def test_processes_agree_to_stop_once_a_second(monkeypatch, seconds, asked):
    """This one of two alike is told to stop before step 100 of 200."""
    clock, questions = [0.0], []

    def reduce(report, how):
        questions.append(report)
        return 2 * report

    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    stop = StopSignal(SimpleNamespace(num_processes=2, device="cpu", reduce=reduce))
    agreed = []
    for step in range(200):
        if step == 100:
            stop.requested = True
        if stop.agreed(step):
            agreed.append(step)
        clock[0] += seconds
    assert 0 <= (agreed[0] - 100) * seconds <= 1
    assert len(questions) == pytest.approx(asked, abs=1)
