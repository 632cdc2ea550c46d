"""What `vmae bench` and the suites measure with: the oracle, the refusals, the figures."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vmae import VideoMAE, bench, cli
from vmae.bench import Case, OutOfMemory, check, in_a_process, plain
from vmae.planning import costs, this_device
from vmae.step import PARTS, Step, inputs

TINY = Step("tiny", frames=16, size=64, precision="fp32")


@pytest.mark.parametrize(
    "changes", [{}, {"strategy": "none"}, {"strategy": "running_cell", "target": "pixels"}], ids=str
)
def test_plain_pytorch_is_the_same_function(changes):
    torch.manual_seed(0)
    config = replace(replace(TINY, batch=2).config(), **changes)
    model = VideoMAE(config).double()
    with torch.no_grad():
        for p in model.parameters():  # zero biases and unit gains would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
    clip, tokens = inputs(replace(TINY, batch=2))
    tokens = tokens._replace(latents=tokens.latents.double())
    losses = model(clip, tokens, seed=1), plain(model, clip, tokens)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", ["vmae", "references", "plain", "dual-masking", "huggingface"])
def test_figures(way):
    if way == "huggingface" and not importlib.util.find_spec("transformers"):
        pytest.skip("needs transformers")
    step = replace(TINY, budget=1.0 if way == "huggingface" else TINY.budget)
    found = in_a_process(Case(step, way, rounds=2))
    assert len(found["seconds"]) == 2
    assert all(seconds > 0 for seconds in found["seconds"])
    assert list(found["parts"]) == (["forward", "backward", "optimizer"] if way == "huggingface" else list(PARTS))
    assert sum(found["parts"].values()) == pytest.approx(sum(found["seconds"]) / 2, rel=0.5)
    assert found["tokens"] == 128
    assert "by other means in float32" in found["checked"]
    if sys.platform == "linux":
        assert found["bytes"] > 1e6
        assert found["bytes_between_steps"] > 1e6
    wanted = sum(costs(replace(step, budget=0.15 if way == "dual-masking" else step.budget)).flops().values())
    if way in ("vmae", "references", "plain"):
        assert found["flops"] == wanted
    elif way == "huggingface":  # its embedding is of all tokens, and its projection has its own order
        assert found["flops"] > wanted


def test_nothing_wrong_is_measured(monkeypatch):
    assert check(Case(TINY)) < 1e-4
    monkeypatch.setattr(bench, "plain", lambda *given: 1.01 * plain(*given))
    with pytest.raises(ValueError, match=r"vmae: gradient of .*: expected within 0.001 of that .*, got 0.0099"):
        check(Case(TINY))


@pytest.mark.parametrize(("part", "precision"), [("q", "bf16"), ("k", "fp32")])
def test_one_wrong_gradient_is_found(monkeypatch, part, precision):
    """Of queries or keys, whose share in the norm of the whole is small: a fifth too much."""
    step = replace(TINY, precision=precision)

    def wrong(*given):
        given = [x + 0.2 * (x - x.detach()) if name == part else x for name, x in zip("qkv", given, strict=True)]
        return F.scaled_dot_product_attention(*given)

    monkeypatch.setattr(bench, "F", SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": wrong}))
    with pytest.raises(ValueError, match=r"gradient of \w+"):
        check(Case(step))


def test_a_wrong_loss_is_not_measured(monkeypatch):
    monkeypatch.setattr(bench, "check", lambda case: 0.0)
    monkeypatch.setattr(bench.CpuMemory, "_set", lambda *_: None)
    monkeypatch.setattr(bench, "plain", lambda *given: 1.01 * plain(*given))
    with pytest.raises(ValueError, match="vmae: loss: expected within"):
        bench.measure(Case(TINY))


def test_out_of_memory():
    with pytest.raises(OutOfMemory, match="memory"):
        in_a_process(Case(replace(TINY, batch=1 << 36)))


def test_not_longer_than_it_may():
    with pytest.raises(TimeoutError, match=r"vmae: not done after 0 s"):
        in_a_process(Case(TINY), timeout=0.1)


def test_cases_that_cannot_be():
    with pytest.raises(ValueError, match=r"way: expected one of vmae, .*, got 'faster'"):
        Case(TINY, "faster")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vmae: ValueError: frames: expected a positive multiple of 2, got 3"):
        in_a_process(Case(replace(TINY, frames=3)))


def test_a_minute_is_not_overrun(monkeypatch):
    device = this_device()
    asked = []

    def measured(case, timeout):
        assert 0 < timeout <= 60
        asked.append((case.step.frames, case.step.budget))
        if case.step.frames == 32:
            raise OutOfMemory("too little")
        return {"seconds": [0.5], "bytes": 2**30, "flops": 10**12}

    monkeypatch.setattr(bench, "in_a_process", measured)
    rows = list(bench.quick(replace(TINY, frames=128), device, 60))
    assert asked == [(frames, budget) for budget in (0.15, 1.0) for frames in (16, 32, 64, 128)]
    assert [row[1] is None for row in rows] == [frames == 32 for frames, _ in asked]
    assert "out of memory" in bench.line(*rows[1], device)
    assert bench.line(*rows[0], device).split()[:6] == ["16", "15%", "0.5", "s", "2", "2"]
    assert list(bench.quick(TINY, device, 1)) == []


def test_command(capsys, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["vmae", "bench", "--model", "tiny", "--frames", "16", "--size", "64", "--seconds", "100", "--json"],
    )
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert [row["step"]["budget"] for row in found["steps"]] == [0.15, 1.0]
    assert all(row["found"]["flops"] == row["planned"]["flops"] for row in found["steps"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --model tiny --frames 16 --size 64 --seconds 1", "seconds: expected enough for one measurement, got 1"),
        ("bench --model tiny --frames 16 --size 64 --seconds 0", "seconds: expected more than 0, got 0"),
        ("bench --frames 3", "frames: expected a positive multiple of 2, got 3"),
        ("plan --memory much", "memory: expected an amount like 80GB or 24GiB, got 'much'"),
        ("plan --budget 2", "budget: expected a number from 0 to 1, got 2.0"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vmae", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_plan_command(capsys, monkeypatch):
    arguments = "plan --model tiny --frames 16 --size 64 --device h100 --memory 24GiB --json"
    monkeypatch.setattr(sys, "argv", ["vmae", *arguments.split()])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["memory"]["peak"] == sum(found["memory"]["components"].values())
    assert found["largest"]["frames"] > 16
