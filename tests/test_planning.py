"""Predictions against measured memory, counted arithmetic and brute force."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmae_kernels
from vmae import VideoMAE, VideoMAEConfig, mae, planning
from vmae.planning import DEVICES, GIB, costs, parse_memory, plan
from vmae.step import PARTS, Step, inputs, optimizer_of, run

TINY = Step("tiny", frames=16, size=64, precision="fp32")
ROUND = {"bf16": 1e12, "fp32": 1e11, "bandwidth": 1e10, "attention": 1.0, "call": 0.0}


def arithmetic(step: Step) -> int:
    """FLOP of one step in closed form: products forward, twice as many backward; attention's are seven in all."""
    c = step.config()
    t, h, w = step.grid
    visible = t * (h * w - math.floor(c.mask_ratio * h * w))
    decoded = math.floor(c.budget * step.tokens + 0.5)

    def blocks(depth, width, n):
        return depth * (3 * 24 * n * width**2 + 14 * n**2 * width)

    products = c.width * visible * c.decoder_width + c.decoder_width * decoded * c.latent_width
    embedding = 2 * 2 * visible * 1536 * c.width  # no gradient of the pixels
    total = blocks(c.depth, c.width, visible) + blocks(c.decoder_depth, c.decoder_width, visible + decoded)
    return step.batch * (total + 3 * 2 * products + embedding)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [TINY, Step("base"), Step("large", frames=1024, batch=3)])
def test_arithmetic_in_closed_form(step, precision):
    predicted = costs(replace(step, precision=precision)).flops()
    assert sum(predicted.values()) == pytest.approx(arithmetic(step), rel=1e-6)
    assert list(predicted) == list(PARTS)


def test_arithmetic_as_counted_while_it_is_done():
    model = VideoMAE(TINY.config())
    clip, tokens = inputs(TINY)
    with FlopCounterMode(display=False, custom_mapping={}) as counter:
        run(model, optimizer_of(model), clip, tokens, "bf16")  # whose attention has formulas of its own
    assert counter.get_total_flops() == sum(costs(replace(TINY, precision="bf16")).flops().values())


MEASURE = """
import gc, json, sys, torch
from pathlib import Path
from vmae.step import Step, inputs, optimizer_of, run
from vmae import VideoMAE

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

settings = json.loads(sys.argv[1])
run_on = lambda step: (step, model := VideoMAE(step.config()).train(), optimizer_of(model), *inputs(step))
def once(step, model, optimizer, clip, tokens):
    model.checkpointing = step.checkpointing
    run(model, optimizer, clip, tokens, step.precision)
once(*run_on(Step("tiny", frames=16, size=64, precision=settings["precision"])))  # what is allocated once
gc.collect()
before = resident("VmRSS")
state = run_on(Step(**settings))
once(*state)
idle = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
once(*state)
print(json.dumps([idle - before, resident("VmHWM") - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
@pytest.mark.parametrize(
    "step",
    [
        Step("small", frames=16, precision="fp32"),
        Step("base", frames=32, size=112, precision="fp32", checkpointing=True),
        Step("small", frames=32, size=112, batch=2, budget=1, precision="fp32"),
        Step("small", frames=32, size=112, precision="bf16"),
    ],
    ids=str,
)
def test_memory_as_measured(step, monkeypatch):
    # Makes the C library give back at once what is freed, so that resident is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    settings = json.dumps(planning.asdict(step))
    done = subprocess.run([sys.executable, "-c", MEASURE, settings], capture_output=True, check=True, text=True)
    idle, peak = json.loads(done.stdout)
    predicted = costs(step, cuda=False)
    assert predicted.idle == pytest.approx(idle, rel=0.1)
    assert predicted.peak == pytest.approx(peak, rel=0.1)
    assert predicted.peak - predicted.idle == pytest.approx(peak - idle, rel=0.1)


def test_peak_by_component():
    predicted = costs(TINY)
    model = VideoMAE(TINY.config())
    weights = sum(-(-x.nbytes // 512) * 512 for x in (*model.parameters(), *model.buffers()))
    assert predicted.memory["weights and positions"] == weights
    moments = sum(2 * -(-p.nbytes // 512) * 512 + 512 for p in model.parameters())  # and a step's number
    assert predicted.memory["optimizer"] == moments
    assert predicted.idle == weights + moments + predicted.memory["clips and tokens"]
    assert predicted.peak == sum(predicted.memory.values()) > predicted.idle


def test_what_a_layer_keeps_for_its_backward():
    """A norm, or an activation, and a linear layer: under autocast what goes in, and nothing of what is cast."""
    x = torch.randn(1, 100, 64, requires_grad=True)
    for cheap, kept in ((torch.nn.LayerNorm(64), 2 * 512), (torch.nn.GELU(), 0)):  # each token's mean and deviation
        linear = torch.nn.Linear(64, 192)
        with planning.Recorder() as recorder, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = mae._recomputed(cheap, linear, x)
        assert sum(size for _, size in recorder.memory) == -(-y.nbytes // 512) * 512 + kept
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            other = mae._kept(cheap, linear, x)
        given = [x, *linear.parameters(), *cheap.parameters()]
        results = [torch.autograd.grad(result.square().sum(), given) for result in (y, other)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frames", [128, 512])
def test_activations_in_closed_form(frames):
    """Of a block, for each token: twice the sum of blocks in float32; queries, keys and values, what the attention and
    the first layer of the MLP give in bfloat16, 8 numbers per channel; and the attention's sums."""
    step = Step("base", frames)
    found = costs(step).memory
    c, (t, h, w) = step.config(), step.grid
    visible = t * (h * w - math.floor(c.mask_ratio * h * w))
    tokens = visible + math.floor(c.budget * step.tokens + 0.5)
    encoder = c.depth * visible * (24 * c.width + 4 * c.heads)
    decoder = c.decoder_depth * tokens * (24 * c.decoder_width + 4 * c.decoder_heads)
    assert found["encoder's activations"] == pytest.approx(encoder, rel=0.02)
    assert found["decoder's activations"] == pytest.approx(decoder, rel=0.02)


def test_memory_grows_with_what_it_should():
    peak = costs(Step("small")).peak
    assert costs(Step("small", checkpointing=True)).peak < peak < costs(Step("small", budget=0.5)).peak
    assert peak < costs(Step("small", batch=2)).peak
    assert costs(Step("small"), cuda=False).peak < peak  # whose layers cast no weights
    a, b, c = (costs(Step("small", frames=frames)).peak for frames in (128, 192, 256))
    assert c - b == pytest.approx(b - a, rel=0.01)  # a straight line


@pytest.mark.parametrize("memory", [1.05, 1.5])
def test_largest_is_the_largest(memory):
    device = DEVICES["h100"]
    found = plan(TINY, device, memory * GIB)
    assert planning.needed(costs(replace(TINY, frames=found.frames))) <= memory * GIB
    assert planning.needed(costs(replace(TINY, frames=found.frames + 2))) > memory * GIB
    assert planning.needed(costs(replace(TINY, batch=found.batch))) <= memory * GIB
    assert planning.needed(costs(replace(TINY, batch=found.batch + 1))) > memory * GIB


@pytest.mark.parametrize("need", [lambda n: 7 * n + 3, lambda n: 5 * n + 20 * (n > 30), lambda n: max(9 * n, 200)])
@pytest.mark.parametrize("start", [1, 40, 100])
@pytest.mark.parametrize("room", [0, 10, 100, 199, 200, 333, 10_000])
def test_search(need, start, room):
    wanted = max((n for n in range(1, 101) if need(n) <= room), default=0)
    assert planning._largest(need, room, start, 100) == wanted


def test_nothing_fits():
    found = plan(TINY, DEVICES["h100"], 0.5 * GIB)
    assert (found.frames, found.batch) == (0, 0)
    assert "does NOT fit" in planning.table(found)
    assert "no clip is short enough" in planning.table(found)
    assert planning.facts(found)["fits"] is False


def test_a_step_that_no_shorter_one_could_replace():
    step = Step("tiny", frames=128, size=32, budget=0.05, precision="fp32")  # below 10 frames it decodes nothing
    found = plan(step, DEVICES["h100"], 0.5 * GIB)
    assert planning.needed(found.costs) > 0.5 * GIB
    assert (found.frames, found.batch) == (0, 0)
    shortest = planning.needed(costs(replace(step, frames=10)))
    assert shortest < planning.needed(found.costs)
    assert plan(step, DEVICES["h100"], shortest).frames == 10


def test_time_is_that_of_the_slowest_limit():
    step = costs(TINY)
    device = DEVICES["h100"]._replace(**ROUND)
    total = sum(max(w.flops / 1e11, w.bytes / 1e10) for w in step.work)
    assert step.seconds(device) == pytest.approx(total)
    assert step.seconds(device._replace(call=1.0)) == len(step.work)
    assert step.seconds(device._replace(attention=0.01)) > step.seconds(device)
    half = costs(replace(TINY, precision="bf16"))
    assert half.seconds(device._replace(bf16=1e9)) > half.seconds(device)
    assert step.seconds(device._replace(bf16=1e9)) == step.seconds(device)


def test_of_what_is_gathered_from_only_the_part_that_is_read_counts():
    c, (t, h, w) = TINY.config(), TINY.grid
    visible = t * (h * w - math.floor(c.mask_ratio * h * w))
    (cut,) = [w for w in costs(TINY).work if w.operation == "tubelets"]
    indices = 8 * visible
    # uint8 in, float32 out; with the indices, and six means and deviations if they are tensors
    assert cut.bytes == pytest.approx((1 + 4) * 1536 * visible + indices, abs=6 * 4)
    x, rows = torch.zeros(1, 100, 8), torch.tensor([[3, 1, 99]])
    with planning.Recorder() as recorder:
        vmae_kernels.gather_tokens(x, rows)
    (gather,) = [w for w in recorder.work if w.operation == "gather_tokens"]
    assert gather.bytes == 2 * 3 * 8 * 4 + 3 * 8


def test_this_device_is_measured():
    device = planning.this_device()
    assert all(value > 0 for value in (device.bf16, device.fp32, device.bandwidth, device.memory, device.call))
    assert 0 < device.attention <= 1


@pytest.mark.parametrize(
    ("text", "wanted"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("512MiB", 2**29), ("8G", 8e9)]
)
def test_memory_as_people_write_it(text, wanted):
    assert parse_memory(text) == wanted


@pytest.mark.parametrize("text", ["", "80", "GB", "-3GB", "0GB", "80 gigs", "nanGB"])
def test_no_memory(text):
    with pytest.raises(ValueError, match="memory: expected an amount like 80GB or 24GiB, got"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 15}, "frames: expected a positive multiple of 2, got 15"),
        ({"size": 100}, "size: expected a positive multiple of 16, got 100"),
        ({"budget": 0.95}, "budget: expected 1 to"),
        ({"budget": 1.5}, "budget: expected a number from 0 to 1, got 1.5"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
    ],
)
def test_steps_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        costs(replace(TINY, **changes))


def test_a_model_without_memory():
    with torch.device("meta"):
        model = VideoMAE(VideoMAEConfig.large())
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
