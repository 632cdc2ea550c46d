"""The page: what it holds is what was computed, and a browser shows that.

The browser's tests need Chromium and playwright (`pip install playwright`), and are skipped without them.
"""

import base64
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import AdaptiveTokenizer, TokenizerConfig, Tokens, VideoMAE, VideoMAEConfig, load_clip
from vmae.masking import SCORED, STRATEGIES, select
from vmae.motion import motion
from vmae.page import BUDGETS, Masking, Picture, Section, page, section, selections

TINY = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 1}
MASKING = Masking(mask_ratio=0.5, budget=0.2)
CHROMIUM = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def tokenizer() -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(TokenizerConfig.tiny()).eval()


@pytest.fixture(scope="module")
def shown(moving_square, tokenizer) -> Section:
    torch.manual_seed(1)
    model = VideoMAE(VideoMAEConfig(frames=32, size=48, mask_ratio=0.5, **TINY))
    return section(
        moving_square, tokenizer, title="<!--<script></script><b>", frames=32, size=48, model=model, precision="fp32"
    )


@pytest.fixture(scope="module")
def file(shown, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    page([shown], MASKING, path)
    return path


def data_of(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def tokens_of(bits: str, n: int) -> list[int]:
    packed = base64.b64decode(bits)
    assert len(packed) == -(-n // 8)
    return [i for i in range(n) if packed[i // 8] & (128 >> i % 8)]


def frames_of(sheets: dict[str, Any], frames: int, height: int, width: int) -> np.ndarray:
    found = []
    for frame in range(frames):
        number, at = divmod(frame, sheets["per"])
        head, data = sheets["files"][number].split(",")
        assert head == "data:image/jpeg;base64"
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        y, x = at // sheets["columns"] * height, at % sheets["columns"] * width
        found.append(sheet[y : y + height, x : x + width])
    return np.stack(found)


# --- what it holds --------------------------------------------------------------------------------------------------


def test_adaptive_selection_follows_what_moves(moving_square, tokenizer):
    clip = load_clip(moving_square, frames=32, size=96)
    with torch.no_grad():
        tokens = tokenizer.encode(clip)
    mask, chosen = selections(Section("", "", clip, tokens), MASKING)
    moved = torch.from_numpy(motion(clip)).flatten()
    at = {name: next(one for one in found if one.budget == 0.2) for name, found in chosen.items() if name != "none"}
    assert {len(one.tokens) for one in at.values()} == {115}
    for one in at.values():
        assert one.motion == pytest.approx(float(moved[one.tokens].sum() / moved[mask.hidden[0]].sum()))
    assert at["adaptive"].motion > 1.5 * max(at["random"].motion, at["uniform"].motion, at["running_cell"].motion)


def test_every_strategy_at_every_budget(shown, file):
    (facts,) = data_of(file)["sections"]
    n, hidden = 16 * 9, 16 * 4
    assert (facts["grid"], facts["hidden"], facts["frames"]) == ([16, 3, 3], hidden, 32)
    mask, _ = selections(shown, MASKING)
    assert tokens_of(facts["visible"], n) == mask.visible[0].tolist()
    with_scores = {"adaptive": shown.tokens.scores, **shown.scores}
    expected = [name for name in STRATEGIES if name not in SCORED or name in with_scores]
    assert list(facts["strategies"]) == expected
    assert "everest" in expected
    for name, found in facts["strategies"].items():
        budgets = [one["budget"] for one in found]
        assert budgets == ([hidden / n] if name == "none" else [b for b in sorted({0.2, *BUDGETS}) if b <= hidden / n])
        for one in found:
            random = min(0.05, one["budget"]) if name in SCORED else 0.0
            wanted = select(
                name, mask.hidden, (16, 3, 3), budget=one["budget"], random=random, seed=0, scores=with_scores.get(name)
            )[0]
            assert tokens_of(one["bits"], n) == wanted.tolist()
            assert one["tokens"] == len(wanted)


def test_scores_and_pictures(shown, file):
    (facts,) = data_of(file)["sections"]
    scores = shown.tokens.scores[0].numpy()
    low, high = np.percentile(scores, (1, 99))
    levels = np.frombuffer(base64.b64decode(facts["levels"]), np.uint8)
    np.testing.assert_allclose(levels, 255 * np.clip((scores - low) / (high - low), 0, 1), atol=0.51)
    np.testing.assert_allclose(facts["scores"], scores.reshape(16, 9).mean(1), atol=1e-5)
    for sheets, clip in (
        (facts["clip"], shown.clip),
        *((said["sheets"], picture.clip) for said, picture in zip(facts["pictures"], shown.pictures, strict=True)),
    ):
        drawn = frames_of(sheets, 32, 48, 48)
        wanted = clip[0].permute(1, 2, 3, 0).numpy()
        # An untrained tokenizer gives noise, of which JPEG keeps the means.
        off = (drawn.astype(float) - wanted).reshape(32, 3, 16, 3, 16, 3).mean((2, 4))
        assert np.abs(off).max() < 4
    assert facts["pictures"][0]["tokens"] is None
    assert tokens_of(facts["pictures"][1]["tokens"], 144) == shown.pictures[1].tokens.tolist()


def test_sheets_of_a_long_clip(tmp_path):
    clip = torch.randint(0, 256, (1, 3, 130, 1, 1), dtype=torch.uint8).repeat_interleave(16, 3).repeat_interleave(16, 4)
    tokens = Tokens(torch.zeros(1, 65, 6), torch.zeros(1, 65, dtype=torch.int32), torch.zeros(1, 65), (65, 1, 1))
    mask = Masking(mask_ratio=0.0)
    with pytest.raises(ValueError, match="mask_ratio: expected at least one of 1 places to be hidden"):
        page([Section("", "", clip, tokens)], mask, tmp_path / "page.html")
    clip = clip.repeat(1, 1, 1, 1, 2)
    tokens = Tokens(torch.zeros(1, 130, 6), torch.zeros(1, 130, dtype=torch.int32), torch.zeros(1, 130), (65, 1, 2))
    page([Section("", "", clip, tokens)], MASKING, tmp_path / "page.html")
    (facts,) = data_of(tmp_path / "page.html")["sections"]
    assert len(facts["clip"]["files"]) == 3
    drawn = frames_of(facts["clip"], 130, 16, 32)
    assert np.abs(drawn.astype(int) - clip[0].permute(1, 2, 3, 0).numpy()).mean() < 5  # neighbours' colours run


def test_the_tokenizers_picture_is_its_reconstruction(shown, tokenizer):
    with torch.no_grad():
        seen = tokenizer.decode(tokenizer.encode(shown.clip))
    assert (shown.pictures[0].clip.float() / 255 - seen).abs().max() < 0.51 / 255 + 1e-4
    psnr = -10 * float(((seen.clamp(0, 1) - shown.clip / 255) ** 2).mean().log10())
    assert f"tokenizer, {psnr:.1f} dB" == shown.pictures[0].title


def test_the_models_picture_is_its_prediction(moving_square, tokenizer):
    """Latents through the tokenizer, where it selects; elsewhere the tokenizer's own."""
    torch.manual_seed(1)
    model = VideoMAE(VideoMAEConfig(frames=32, size=48, mask_ratio=0.5, budget=0.3, **TINY)).eval()
    found = section(moving_square, tokenizer, title="", frames=32, size=48, model=model, precision="fp32")
    with torch.no_grad():
        tokens = tokenizer.encode(found.clip)
        mask, chosen = model.masks(found.clip, tokens, seed=0)
        latents = tokens.latents.clone()
        latents[0, chosen[0]] = model.predict(found.clip, mask.visible, chosen)[0].clamp(-1, 1)
        wanted = tokenizer.decode(tokens._replace(latents=latents))
    assert torch.equal(found.pictures[1].tokens, chosen[0])
    assert (found.pictures[1].clip.float() / 255 - wanted.clamp(0, 1)).abs().max() < 0.51 / 255 + 1e-4
    assert found.pictures[1].title == "model, 30% of the tokens"


@pytest.mark.parametrize("strategy", ["random", "flow"])
def test_a_model_of_pixels_that_is_right_gives_the_clip(moving_square, tokenizer, monkeypatch, strategy):
    """Its targets for predictions: then the picture is the clip, up to the deviation's small term."""
    if strategy == "flow":
        pytest.importorskip("cv2")
    model = VideoMAE(VideoMAEConfig(frames=32, size=48, mask_ratio=0.5, target="pixels", strategy=strategy, **TINY))
    clip = load_clip(moving_square, frames=32, size=48)
    monkeypatch.setattr(model, "predict", lambda clip, visible, selected: model.target(clip, None, selected))
    found = section(moving_square, tokenizer, title="", frames=32, size=48, model=model, precision="fp32")
    assert len(found.pictures[1].tokens) == round(0.15 * 144)
    assert (found.pictures[1].clip.int() - clip).abs().max() <= 1
    wrong = torch.zeros(1, len(found.pictures[1].tokens), 1536)
    monkeypatch.setattr(model, "predict", lambda *_: wrong)
    found = section(moving_square, tokenizer, title="", frames=32, size=48, model=model, precision="fp32")
    changed = (found.pictures[1].clip.int() - clip).abs().amax((0, 1)).unflatten(0, (16, 2)).unflatten(2, (3, 16))
    changed = changed.unflatten(4, (3, 16)).amax((1, 3, 5)).flatten() > 1
    assert set(changed.nonzero().flatten().tolist()) <= set(found.pictures[1].tokens.tolist())


def test_a_model_of_another_tokenizers_latents_is_refused(moving_square, tokenizer):
    model = VideoMAE(VideoMAEConfig(frames=32, size=48, mask_ratio=0.5, latent_width=4, **TINY))
    with pytest.raises(ValueError, match=r"latents"):
        section(moving_square, tokenizer, title="", frames=32, size=48, model=model)


def test_a_page_of_one_latent_frame(tmp_path):
    tokens = Tokens(torch.zeros(1, 4, 6), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4), (1, 2, 2))
    clip = torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8)
    page([Section("still", "", clip, tokens)], Masking(mask_ratio=0.5, budget=0.5, random=0.0), tmp_path / "page.html")
    assert "NaN" not in json.dumps(data_of(tmp_path / "page.html"))


def test_it_needs_nothing_else(file):
    text = file.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert text.count("</script>") == 2
    assert "&lt;!--&lt;script&gt;&lt;/script&gt;&lt;b&gt;" in text


# --- what a browser shows -------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec("playwright")), reason="needs Chromium and playwright"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, file) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    opened.goto(file.as_uri())
    opened.wait_for_selector("body[data-ready=yes]")
    yield opened
    assert said == []
    opened.close()


def panel(tab, number: int) -> np.ndarray:
    """A panel's pixels [H, W, 3]."""
    data = tab.evaluate("n => document.querySelectorAll('.panels canvas')[n].toDataURL('image/png')", number)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)


def frame_shown(tab) -> int:
    return int(tab.locator(".seek").input_value())


@needs_browser
def test_panels_show_the_frame_its_scores_and_the_selection(tab, file, shown):
    (facts,) = data_of(file)["sections"]
    n, visible = 144, set(tokens_of(facts["visible"], 144))
    assert tab.locator("h2").inner_text() == "<!--<script></script><b>"
    inferno = np.frombuffer(base64.b64decode(data_of(file)["inferno"]), np.uint8).reshape(256, 3).astype(int)
    levels = np.frombuffer(base64.b64decode(facts["levels"]), np.uint8)
    clip = frames_of(facts["clip"], 32, 48, 48).astype(int)
    for strategy, step, frame in (("adaptive", None, 0), ("random", 2, 7), ("uniform", 8, 31), ("none", 0, 12)):
        tab.select_option("select", strategy)
        if step is None:
            step = next(i for i, one in enumerate(facts["strategies"][strategy]) if one["budget"] == 0.2)
            assert tab.locator(".budget input").input_value() == str(step)
        elif strategy != "none":
            tab.locator(".budget input").fill(str(step))
        else:
            assert tab.locator(".budget input").is_disabled()
        tab.locator(".seek").fill(str(frame))
        chosen = facts["strategies"][strategy][step]
        said = tab.locator(".count").inner_text()
        assert said == f"{chosen['tokens']} tokens, {chosen['motion']:.0%} of the motion".replace("%", " %")
        picked = set(tokens_of(chosen["bits"], n))
        assert np.abs(panel(tab, 0) - clip[frame]).max() <= 3
        score, selected = panel(tab, 1), panel(tab, 2)
        for place in range(9):
            token = frame // 2 * 9 + place
            inside = np.s_[place // 3 * 16 + 2 : place // 3 * 16 + 14, place % 3 * 16 + 2 : place % 3 * 16 + 14]
            own = clip[frame][inside]
            assert np.abs(score[inside] - (190 * inferno[levels[token]] + 65 * own) / 255).max() <= 4
            blue = (166 * np.array([64, 128, 255]) + 89 * own) / 255
            wanted = own if token in picked else blue if token in visible else 46 / 255 * own
            assert np.abs(selected[inside] - wanted).max() <= 4, (strategy, token)


@needs_browser
def test_it_plays(tab):
    tab.get_by_role("button", name="Play").click()
    tab.wait_for_function("document.querySelector('.seek').value > 4")
    before = panel(tab, 0)
    tab.get_by_role("button", name="Pause").click()
    at = frame_shown(tab)
    tab.wait_for_timeout(300)
    assert frame_shown(tab) == at
    assert f"frame {at} of 32." in tab.locator(".at").inner_text()
    tab.keyboard.press("s")  # not where the button has the focus: the strategy
    assert tab.locator("select").input_value() == "random"
    tab.locator(".seek").fill("0")
    assert np.abs(panel(tab, 0) - before).max() > 20


@needs_browser
def test_keys_and_timeline(tab, file):
    (facts,) = data_of(file)["sections"]
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        tab.keyboard.press(key)
        assert frame_shown(tab) == frame
    counts = [one["tokens"] for one in facts["strategies"]["adaptive"]]
    start = int(tab.locator(".budget input").input_value())
    for key, step in (("+", start + 1), ("-", start), ("-", start - 1)):
        tab.keyboard.press(key)
        assert tab.locator(".count").inner_text().startswith(f"{counts[step]} tokens")
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelector('.seek').value > 1")
    tab.keyboard.press(" ")
    box = tab.locator(".time svg").bounding_box()
    for share, frame in ((0.5, 16), (0.99, 31), (0.01, 0)):
        tab.mouse.click(box["x"] + share * box["width"], box["y"] + 40)
        assert frame_shown(tab) == frame
    bars = tab.locator(".time rect").evaluate_all("all => all.map(bar => +bar.getAttribute('height'))")
    picked = tokens_of(facts["strategies"]["adaptive"][start - 1]["bits"], 144)
    wanted = np.bincount(np.array(picked) // 9, minlength=16)
    np.testing.assert_allclose(bars, 84 * wanted / wanted.max(), atol=1e-6)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phones_width(browser, file, scheme):
    tab = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    tab.goto(file.as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(box["width"] > 130 for box in (one.bounding_box() for one in tab.locator(".panels canvas").all()))
    ink, paper = (
        tab.evaluate("name => getComputedStyle(document.body)[name]", name) for name in ("color", "backgroundColor")
    )
    bright = [sum(map(int, re.findall(r"\d+", colour))) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark")
    tab.close()


@needs_browser
def test_sections_have_keys_of_their_own(browser, shown, tmp_path):
    other = Section("other", "", shown.clip, shown.tokens, [Picture("again", shown.clip)])
    page([shown, other], MASKING, tmp_path / "two.html")
    tab = browser.new_page()
    tab.goto((tmp_path / "two.html").as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    tab.locator("section").nth(1).locator("h2").click()
    tab.keyboard.press("ArrowRight")
    assert [one.input_value() for one in tab.locator(".seek").all()] == ["0", "1"]
    tab.close()
