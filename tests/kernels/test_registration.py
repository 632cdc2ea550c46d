"""What torch.library, torch.compile, autocast, VMAE_KERNELS and the import system see of the package."""

import ast
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmae_kernels.layer_norm
import vmae_kernels.mlp  # these register operations that the package itself does not
from vmae_kernels import (
    attention,
    attention_varlen,
    causal_conv3d,
    decoder_tokens,
    fsq,
    gather_tokens,
    scatter_tokens,
    soft_topk,
    topk,
    topk_partition,
    tubelets,
)

OPS = torch.ops.vmae_kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
CASTING = {"attention", "attention_kv_indices", "attention_varlen", "causal_conv3d", "causal_conv3d_cache"}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def index(*rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype)


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def calls(extra=0):
    """name -> (function, its floating-point inputs, all differentiable); `extra` changes sizes, not ranks."""
    n, b = 6 + extra, 2 + extra
    rows = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s))[: 3 + extra] for s in range(b)])
    cu, cu_k = offsets(0, 3, 5 + extra), offsets(0, 2, 7)
    packed = [rand(length, 2, 16, seed=s) for s, length in enumerate((5 + extra, 7, 7))]
    heads = [rand(b, 2, length, 16, seed=s) for s, length in enumerate((4 + extra, n, n))]
    video, conv = rand(b, 3, 4 + 2 * extra, 4, 6), [rand(b, 3, 4 + extra, 5, 4), rand(4, 3, 3, 3, 3, seed=1)]
    scores = rand(b, n)
    norm = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}

    def scatter(y, fill):
        return scatter_tokens(y, rows.int(), 9 + extra, fill=fill)

    def decode(visible, mask, positions):
        return decoder_tokens(visible, rows, rows.flip(1), mask, positions)

    def conv_cache(x, weight, bias, cache):
        return causal_conv3d(x, weight, bias, stride=(1, 2, 1), cache=cache, return_cache=True)

    return {
        "topk": (lambda s: topk(s, 2 + extra), [scores]),
        "topk_partition": (lambda s: topk_partition(s, 2 + extra), [scores]),
        "soft_topk": (lambda s: soft_topk(s, 2 + extra, sigma=0.5, samples=6, seed=3 + extra), [scores]),
        "gather_tokens": (lambda x: gather_tokens(x, rows), [rand(b, n, 5)]),
        "gather_tokens_unique": (lambda x: gather_tokens(x, rows, unique=True), [rand(b, n, 5)]),
        "scatter_tokens": (scatter, [rand(b, 3 + extra, 5), rand(5, seed=1)]),
        "scatter_tokens_among": (scatter, [rand(b, 3 + extra, 5), rand(b, 9 + extra, 5, seed=1)]),
        "scatter_tokens_number": (lambda y: scatter_tokens(y, rows, n, fill=0.5), [rand(b, 3 + extra, 5)]),
        "decoder_tokens": (decode, [rand(b, 3 + extra, 5), rand(5, seed=1), rand(n, 5, seed=2)]),
        "decoder_tokens_batch": (decode, [rand(b, 3 + extra, 5), rand(5, seed=1), rand(b, n, 5, seed=2)]),
        "tubelets": (lambda v: tubelets(v, rows, size=(2, 2, 2), **norm), [video]),
        "attention": (lambda q, k, v: attention(q, k, v), heads),
        "attention_kv_indices": (lambda q, k, v: attention(q, k, v, scale=0.2, kv_indices=rows), heads),
        "attention_varlen": (lambda q, k, v: attention_varlen(q, k, v, cu, cu_k, 5 + extra, 5 + extra), packed),
        "causal_conv3d": (lambda x, w: causal_conv3d(x, w), conv),
        "causal_conv3d_cache": (conv_cache, [*conv, rand(4, seed=2), rand(b, 3, 2, 5, 4, seed=3)]),
        "fsq": (lambda z: fsq(z, [8, 5, 5]), [rand(b, n, 3)]),
    }


def evaluate(function, inputs):
    """Results, and the gradients of their weighted sum for every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    chosen = [y for y in results if y.requires_grad]
    if not chosen:
        return [*results]
    weights = [rand(*y.shape, seed=7, dtype=y.dtype) for y in chosen]
    grads = torch.autograd.grad(chosen, inputs, weights)
    return [*(y.detach() for y in results), *grads]


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        # The same code runs below; reductions that aot_eager places elsewhere may round otherwise.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def last(x):
    return x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def samples_of_ops():
    """One call of every registered operation, with gradients wherever it has them."""
    x = rand(2, 6, 5).requires_grad_()
    y, mask, table = (rand(*s, seed=i).requires_grad_() for i, s in enumerate(((2, 3, 5), (5,), (6, 5))))
    rows, cu, cu_k = index([0, 5, 2], [1, 3, 4]), offsets(0, 3, 3, 5), offsets(0, 2, 4, 7)
    repeated = index([0, 5, 5], [1, 1, 1])
    q, k, v = (rand(2, 2, 4, 16, seed=s).requires_grad_() for s in range(3))
    packed = [rand(length, 2, 16, seed=s).requires_grad_() for s, length in enumerate((5, 7, 7))]
    scores, video = rand(2, 6).requires_grad_(), rand(2, 3, 4, 4, 6)
    z, norm = rand(2, 4, 3).requires_grad_(), ([2, 2, 2], [0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    pixels = (video.abs() * 50).to(torch.uint8)
    conv = rand(2, 3, 4, 5, 4).requires_grad_(), rand(4, 3, 3, 3, 3, seed=1).requires_grad_()
    bias, cache = rand(4, seed=2).requires_grad_(), rand(2, 3, 2, 5, 4, seed=3).requires_grad_()
    y5 = rand(2, 4, 4, 5, 4, seed=4).requires_grad_()
    patches = rand(2, 3, 24)
    half = [x.detach().bfloat16().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    wide = [x.requires_grad_() for x in (rand(2, 6, 5), rand(4, 5, seed=1), rand(4, seed=2))]
    norm_weights = [x.requires_grad_() for x in (rand(5, seed=5), rand(5, seed=6))]
    wide2 = [x.requires_grad_() for x in (rand(3, 4, seed=3), rand(3, seed=4))]
    saved = [*(x.detach() for x in half), *(x.detach() for x in OPS.attention_cpu(*half, 0.3))]
    known_packed = [p.detach() for p in packed]
    known_packed += [y.detach() for y in OPS.attention_varlen_reference(*known_packed, cu, cu_k, 3, 4, 0.3)]
    by_kernel = []
    if INTERPRETED:
        rest = (0.3, index([0, 3, 2], [1, 3, 0]), None, None, 0, 0)
        known = [x.detach() for x in (q, k, v)]
        by_kernel = [
            ("attention_kernel", q, k, v, *rest),
            ("attention_kernel_backward", known[0], *known, *OPS.attention_kernel(*known, *rest), *rest),
        ]
    return [
        ("topk", scores, 2),
        ("topk_partition", scores, 0),
        ("topk_partition", scores.detach().bfloat16(), 6),
        ("soft_topk", scores, 2, 0.5, 6, 1, 2),
        ("soft_topk_backward", rand(2, 6, seed=1), scores.detach(), 2, 0.5, 6, 1, 2),
        ("gather_tokens", x, repeated, False),
        ("gather_tokens", x.transpose(1, 2).contiguous().transpose(1, 2), rows.int(), True),
        ("gather_tokens_backward", y, repeated, 6, False),
        ("gather_tokens_backward", y, rows, 6, True),
        ("scatter_tokens", y, rows, 8, mask, 0.0),
        ("scatter_tokens", y, rows.int(), 8, None, 0.5),
        ("scatter_tokens", y, rows, 6, x, 0.0),
        ("scatter_tokens_fill_backward", x, rows),
        ("decoder_tokens", y, rows, repeated, mask, table),
        ("decoder_tokens", y, rows.int(), repeated[:, :2], mask, x),
        ("tubelets", video.clone().requires_grad_(), repeated, *norm, torch.float32),
        ("tubelets", pixels, rows, *norm, torch.bfloat16),
        ("tubelets_backward", patches, repeated, [2, 3, 4, 4, 6], norm[0], norm[2], torch.float32),
        ("attention", q, k, v, None, None),
        ("attention", q, k, v, 0.3, rows[:, :1]),
        ("attention", *half, None, None),
        ("attention_cpu", *half, 0.3),
        ("linear", *wide),
        ("linear_cpu", wide[0].detach().bfloat16(), *wide[1:]),
        ("linear_cpu_input_gradient", wide[0].detach().bfloat16(), rand(5, 7)),
        ("linear_cpu_weight_gradient", rand(2, 6, 4).bfloat16(), wide[0].detach().bfloat16(), rand(4, 5), True),
        ("layer_norm", wide[0], *norm_weights, 1e-6),
        ("layer_norm_cpu", wide[0], *norm_weights, 1e-6),
        ("layer_norm_cpu_backward", rand(2, 6, 5).bfloat16(), wide[0].detach(), rand(5), rand(2, 6, 2).abs()),
        ("mlp", *wide, *wide2),
        ("mlp_cpu_first", wide[0].detach().bfloat16(), *wide[1:]),
        ("mlp_cpu_second", *(rand(2, 6, 4, seed=s).bfloat16() for s in (1, 2)), *wide2),
        ("mlp_cpu_gelu_gradient", rand(2, 6, 3).bfloat16(), rand(3, 4), rand(2, 6, 4, seed=1).bfloat16()),
        ("attention_cpu_backward", saved[0], *saved, 0.3),
        ("attention_varlen", *packed, cu, cu_k, 3, 4, None),
        *by_kernel,
        ("attention_varlen_reference", *packed, cu, cu_k, 3, 4, 0.3),
        ("attention_varlen_reference_backward", rand(5, 2, 16), *known_packed, cu, cu_k, 3, 4, 0.3),
        ("causal_conv3d", *conv, None, None, [1, 1, 1], False),
        ("causal_conv3d", *(x.detach() for x in conv), None, None, [1, 1, 1], True),
        ("causal_conv3d", last(conv[0]), conv[1], bias, cache, [1, 2, 2], False),
        ("causal_conv3d_input_gradient", y5, conv[1], [1, 1, 1], [4, 5, 4], True, False),
        ("causal_conv3d_input_gradient", last(y5), conv[1], [1, 1, 1], [4, 5, 4], False, True),
        ("causal_conv3d_weight_gradient", conv[0], cache, y5, [3, 3, 3], [1, 1, 1]),
        ("causal_conv3d_weight_gradient", last(conv[0]), None, last(y5), [3, 3, 3], [1, 1, 1]),
        ("fsq", z, [8, 5, 5]),
        ("fsq_backward", rand(2, 4, 3, seed=1), z.detach(), [8, 5, 5]),
        ("random_words", 2, 5, 7, 11, 0, 1, 3, torch.device("cpu")),
    ]


OP_SAMPLES = samples_of_ops()


@pytest.mark.parametrize("number", range(len(OP_SAMPLES)), ids=lambda i: f"{i}-{OP_SAMPLES[i][0]}")
def test_opcheck(number):
    name, *args = OP_SAMPLES[number]
    torch.library.opcheck(getattr(OPS, name).default, tuple(args))


def test_every_operation_is_checked():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("vmae_kernels::")}
    kernels = {"attention_kernel", "attention_kernel_backward"}
    assert registered - (set() if INTERPRETED else kernels) == {name for name, *_ in OP_SAMPLES}
    assert set(vmae_kernels.__all__) <= registered
    assert set(vmae_kernels.__all__) <= set(calls())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(calls()))
def test_compiled_equals_eager(name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda function, *x: function(*x), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    # Twice as the compiler first saw it, with other values; then with other sizes.
    function, inputs = calls()[name]
    for values in (inputs, [x.flip(0) for x in inputs]):
        assert_same(evaluate(partial(compiled, function), values), evaluate(function, values))
    if dynamic:
        function, inputs = calls(extra=1)[name]
        assert_same(evaluate(partial(compiled, function), inputs), evaluate(function, inputs))


def settings():
    rows, cu = index([0, 5, 2], [1, 3, 4]), offsets(0, 3, 5)
    heads, packed = [rand(2, 2, 6, 16, seed=s) for s in range(3)], [rand(5, 2, 16, seed=s) for s in range(3)]
    conv, video = [rand(2, 3, 4, 5, 4), rand(4, 3, 3, 3, 3, seed=1)], rand(2, 3, 4, 4, 6)
    return {
        "topk": (lambda s, k: topk(s, k), [rand(2, 6)], [2, 3, 0]),
        "topk_partition": (lambda s, k: topk_partition(s, k), [rand(2, 6)], [2, 3, 6]),
        "soft_topk": (
            lambda s, x: soft_topk(s, 2, sigma=x[0], samples=x[1], seed=0),
            [rand(2, 6)],
            [(0.5, 4), (1.5, 7)],
        ),
        "scatter_tokens": (
            lambda y, x: scatter_tokens(y, rows, x[0], fill=x[1]),
            [rand(2, 3, 5)],
            [(8, 0.5), (9, 2.5)],
        ),
        "tubelets": (
            lambda v, x: tubelets(v, rows, size=x[0], mean=x[1], std=x[2]),
            [video],
            [((2, 2, 2), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), ((2, 2, 1), [0.5, 0.2, 0.3], [1.5, 2.0, 3.0])],
        ),
        "attention": (lambda q, k, v, x: attention(q, k, v, scale=x), heads, [0.2, 0.7]),
        "attention_varlen": (
            lambda q, k, v, x: attention_varlen(q, k, v, cu, cu, x[0], x[1], scale=x[2]),
            packed,
            [(3, 4, 0.2), (5, 6, 0.7)],
        ),
        "causal_conv3d": (lambda x, w, s: causal_conv3d(x, w, stride=s), conv, [(1, 2, 2), (2, 1, 1)]),
        "fsq": (lambda z, levels: fsq(z, levels), [rand(2, 6, 3)], [[8, 5, 5], [4, 3, 7]]),
    }


@pytest.mark.parametrize("name", list(settings()))
def test_symbolic_settings(name):
    """What is no tensor comes as an argument too; with dynamic=True the compiler makes numbers symbolic."""
    torch._dynamo.reset()
    function, inputs, values = settings()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for value in values:
        wanted = evaluate(lambda *x, value=value: function(*x, value), inputs)
        assert_same(evaluate(lambda *x, value=value: compiled(*x, value), inputs), wanted)


@pytest.mark.large
def test_integers_may_change_at_every_step():
    """A seed per step, as in training: recompiling for each would run into the limit, an error with fullgraph."""
    torch._dynamo.reset()

    def step(scores, k, seed):
        return soft_topk(scores, k, sigma=0.5, samples=4, seed=seed)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    scores = rand(2, 30)
    for i, seed in enumerate([*range(12), 2**31, 2**32 + 1, 2**62, 2**63 - 1, -1, -5, -(2**63)]):
        run = partial(compiled, k=2 + i % 5, seed=seed)
        assert_same(evaluate(run, [scores]), evaluate(partial(step, k=2 + i % 5, seed=seed), [scores]))


@pytest.mark.parametrize("name", list(calls()))
def test_forward_and_backward_under_a_dispatch_mode(name):
    """Flop counters, selective checkpointing and debuggers are dispatch modes: below one, autograd is switched off."""
    function, inputs = calls()[name]
    wanted = evaluate(function, inputs)
    with FlopCounterMode(display=False):
        got = evaluate(function, inputs)
    assert_same(got, wanted)


def test_errors_are_raised_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, i: gather_tokens(x, i), fullgraph=True, backend="aot_eager")
    x = rand(2, 4, 3)
    compiled(x, index([0, 1], [2, 3]))
    with pytest.raises(ValueError, match=r"-1|4"):
        compiled(x, index([0, 1], [2, 4]))


@pytest.mark.parametrize("name", list(calls()))
def test_autocast(name):
    torch._dynamo.reset()
    function, inputs = calls()[name]

    def cast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*args)

    eager = evaluate(cast, inputs)
    compiled = evaluate(torch.compile(cast, fullgraph=True, backend="aot_eager"), inputs)
    plain = evaluate(function, inputs)
    assert [x.dtype for x in compiled] == [x.dtype for x in eager]
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    wanted = [x.dtype for x in plain]
    if name in CASTING:
        wanted[0] = torch.bfloat16
        torch.testing.assert_close(eager[0].float(), plain[0], rtol=0.05, atol=0.1)
    else:
        assert_same(eager, plain)
    # Gradients, and the cache, keep the inputs' dtype.
    assert [x.dtype for x in eager] == wanted


@pytest.mark.parametrize("name", sorted(set(calls()) - CASTING))
def test_autocast_leaves_half_alone(name):
    function, inputs = calls()[name]
    halves = [x.half() for x in inputs]
    wanted = evaluate(function, halves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(evaluate(function, halves), wanted)


def test_autocast_as_pytorch_casts():
    """Mixed dtypes meet in bfloat16 as they do in scaled_dot_product_attention and conv3d; float64 stays."""
    q, k, v = (rand(2, 2, 4, 16, seed=s) for s in range(3))
    x, weight = rand(1, 3, 4, 5, 4), rand(4, 3, 1, 3, 3, seed=1)
    cu = offsets(0, 4, 8)
    packed = [t.reshape(8, 2, 16) for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        conv = partial(torch.nn.functional.conv3d, padding=(0, 1, 1))
        assert attention(q, k.bfloat16(), v).dtype == sdpa(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert causal_conv3d(x, weight.bfloat16()).dtype == conv(x, weight.bfloat16()).dtype == torch.bfloat16
        wide = [t.double() for t in (q, k, v)]
        assert attention(*wide).dtype == sdpa(*wide).dtype
        assert attention_varlen(*(t.double() for t in packed), cu, cu, 4, 4).dtype == sdpa(*wide).dtype
        assert causal_conv3d(x.double(), weight.double()).dtype == conv(x.double(), weight.double()).dtype
        assert attention_varlen(packed[0], packed[1].bfloat16(), packed[2], cu, cu, 4, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in calls() if not name.startswith("causal_conv3d")])
def test_forced_implementation(name, monkeypatch):
    function, inputs = calls()[name]
    inputs = [x.detach() for x in inputs]
    monkeypatch.delenv("VMAE_KERNELS", raising=False)
    default = function(*inputs)
    for choice in ("torch", "auto"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        torch.testing.assert_close(function(*inputs), default, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setenv("VMAE_KERNELS", "triton")
    if INTERPRETED:
        torch.testing.assert_close(function(*inputs), default, rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"VMAE_KERNELS=triton: \w+ expected "):
            function(*inputs)
    for choice in ("nonsense", "", "Torch"):
        monkeypatch.setenv("VMAE_KERNELS", choice)
        with pytest.raises(ValueError, match=rf"VMAE_KERNELS: expected auto, triton, csrc or torch, got '{choice}'"):
            function(*inputs)


def test_only_relative_imports_torch_and_the_standard_library():
    files = sorted(Path(vmae_kernels.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                # Triton may be imported where its kernels live, never the package by its own name.
                assert name.split(".")[0] in allowed | {"triton"}, f"{file.name} imports {name}"


BARE = """
import sys
blocked = {"numpy", "triton", "einops", "vmae", "hypothesis", "pytest"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import torch
before = set(sys.modules)
import vmae_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"vmae_kernels", "torch", *sys.stdlib_module_names}, new
x = torch.arange(12.0).reshape(1, 4, 3).requires_grad_()
i = vmae_kernels.topk(x[..., 0], 2)
vmae_kernels.gather_tokens(x, i).sum().backward()
vmae_kernels.soft_topk(x[..., 0], 2, sigma=1.0, samples=2, seed=0).sum().backward()
z, codes = vmae_kernels.fsq(x, [3, 4, 5])
video = torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8)
vmae_kernels.tubelets(video, torch.zeros(1, 1, dtype=torch.int64), mean=[0.5] * 3, std=[0.5] * 3)
assert not blocked & {name.split(".")[0] for name in sys.modules}
print("fine", i.tolist())
"""


@pytest.mark.large
def test_imports_with_nothing_but_torch():
    parent = str(Path(vmae_kernels.__file__).parents[1])
    environment = {key: value for key, value in os.environ.items() if key != "VMAE_KERNELS"} | {"PYTHONPATH": parent}
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine [[2, 3]]"
