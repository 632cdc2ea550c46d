"""Adversarial and perceptual losses against closed forms and a plain network."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmae.losses import Discriminator, discriminator_loss, generator_loss, perceptual_distance, r1_penalty


def test_losses_at_known_logits():
    zero = torch.zeros(2, 5)
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    real, fake = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, -3.0]])

    def surprise(p: float) -> float:
        return -math.log(p)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = (surprise(sigmoid(0.5)) + surprise(sigmoid(-3.0))) / 2
    assert generator_loss(fake).item() == pytest.approx(expected, rel=1e-5)
    expected = sum(surprise(sigmoid(x)) for x in (2.0, -1.0)) / 2
    expected += sum(surprise(1 - sigmoid(x)) for x in (0.5, -3.0)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_the_generator_still_learns_when_the_discriminator_is_sure():
    fake = torch.tensor([[-50.0]], requires_grad=True)
    generator_loss(fake).backward()
    assert fake.grad.item() == pytest.approx(-1.0)  # it would vanish for log(1 - sigmoid)


def test_r1_of_a_linear_discriminator():
    weight = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    class Linear(nn.Module):
        def forward(self, video):
            return torch.einsum("bcthw,pcthw->bp", video, weight)

    video = torch.randn(3, 3, 2, 4, 4)
    # The gradient of the sum of a clip's two logits is the sum of the weights, whatever the clip.
    assert r1_penalty(Linear(), video).item() == pytest.approx(weight.sum(0).square().sum().item() / 4, rel=1e-5)
    apart = torch.zeros(2, 3, 2, 4, 4)
    apart[0, :, 0], apart[1, :, 1] = weight[0, :, 0], weight[1, :, 1]
    weight = apart  # patches that do not overlap: the mean of what each has by itself
    expected = (apart[0].square().sum() / 2 + apart[1].square().sum() / 2).item() / 2
    assert r1_penalty(Linear(), video).item() == pytest.approx(expected, rel=1e-5)


def test_r1_against_finite_differences_and_its_own_descent():
    torch.manual_seed(0)
    model = Discriminator(width=4, stages=2)
    video = torch.rand(1, 3, 4, 16, 16)
    direction = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    video.requires_grad_()
    (gradient,) = torch.autograd.grad(model(video).mean(), video)
    step = 1e-3  # kinks of the leaky ReLUs bend the slope
    slope = (model(video + step * direction).mean() - model(video - step * direction).mean()) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=5e-2)
    before = r1_penalty(model, video)
    patches = model(video).shape[1]
    assert before.item() == pytest.approx(patches * gradient.square().sum().item() / 2, rel=1e-4)
    before.backward()  # through the gradient
    with torch.no_grad():
        size = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * before / size * p.grad
    after = r1_penalty(model, video)
    assert after.item() == pytest.approx(0.95 * before.item(), rel=0.01)


@pytest.mark.parametrize("shape", [(16, 64, 64), (2, 16, 16), (6, 48, 32)])
def test_the_discriminator_judges_clips_of_any_size(shape):
    torch.manual_seed(0)
    model = Discriminator(width=8)
    logits = model(torch.rand(2, 3, *shape))
    assert logits.shape[0] == 2
    assert logits.shape[1] >= 1
    logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def vgg_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random, of the shapes of VGG16's configuration D (Simonyan and Zisserman, ICLR 2015, table 1)."""
    generator = torch.Generator().manual_seed(seed)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = dict(zip(places, (64, 64, 128, 128, *[256] * 3, *[512] * 6), strict=True))
    weights, inputs = {}, 3
    for place, outputs in widths.items():
        scale = (2 / (9 * inputs)) ** 0.5
        weights[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        weights[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) * 0.1
        inputs = outputs
    return weights


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({**vgg_weights(), "classifier.0.weight": torch.zeros(1)}, path)
    return path


def test_vgg_distance_against_a_plain_network(vgg_file):
    weights = vgg_weights()
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(x):
        x = ((x + 1) / 2 - mean) / std
        for place in range(30):
            if f"features.{place}.weight" in weights:
                x = nn.functional.conv2d(
                    x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], 1, 1
                )
            elif place in (4, 9, 16, 23):
                x = nn.functional.max_pool2d(x, 2)
            else:
                x = x.relu()
            if place in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                yield x / x.norm(dim=1, keepdim=True)

    expected = sum(((x - y) ** 2).sum(1).mean((1, 2)) for x, y in zip(features(a), features(b), strict=True))
    distance = perceptual_distance(str(vgg_file))
    torch.testing.assert_close(distance(a, b), expected)
    assert torch.equal(distance(a, a), torch.zeros(2))
    assert not any(p.requires_grad for p in distance.parameters())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda w: w.pop("features.5.bias"), r"features\.5\.bias \[128\] of VGG16, found nothing"),
        (
            lambda w: w.update({"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            r"\[64, 3, 3, 3\].*found \[64, 1, 3, 3\]",
        ),
    ],
)
def test_files_that_are_no_vgg_are_refused(damage, words, tmp_path):
    weights = vgg_weights()
    damage(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=words):
        perceptual_distance(str(tmp_path / "weights.safetensors"))


def test_other_sources_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"none")
    for source, words in (
        (str(tmp_path / "x.safetensors"), "expected a safetensors file"),
        ("missing.safetensors", "found no file missing.safetensors"),
        ("vgg.pth", "found no file vgg.pth"),
        ("no_such_package:LPIPS", "callable of an installed package, got no_such_package:LPIPS"),
        ("math:nothing", "math:nothing"),
        ("builtins:dict", "torch module, got dict"),
        ("torch.nn:Linear", "torch.nn:Linear: .*missing"),
        ("math:pi", "not callable"),
        (".foo:bar", "callable of an installed package, got .foo:bar"),
        (":x", "found no file :x"),
    ):
        with pytest.raises(ValueError, match=words):
            perceptual_distance(source)


def test_an_installed_package_gives_the_distance(tmp_path, monkeypatch):
    (tmp_path / "my_distance.py").write_text(
        "import torch\n\nclass Squared(torch.nn.Module):\n    def forward(self, a, b):\n        return (a - b) ** 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    distance = perceptual_distance("my_distance:Squared")
    assert distance(torch.ones(1), torch.zeros(1)).item() == 1
    assert not distance.training
