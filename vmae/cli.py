"""The command `vmae`."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vmae import bench, checkpoint, distributed, doctor, planning
from vmae.dataset import KILLED, tells_of_a_killed_worker
from vmae.demo import demo
from vmae.evaluation import table
from vmae.features import Per, encode_long, encode_video
from vmae.mae import VideoMAE
from vmae.mae_evaluation import evaluated_mae, mae_table
from vmae.optimisation import Precision, device_of, precision_of
from vmae.page import Masking, is_page, page, section
from vmae.pretraining import PretrainRun, cache, pretrain
from vmae.probe import ProbeRun, probe
from vmae.probe import table as table_of_probes
from vmae.step import Step
from vmae.tokenizer import AdaptiveTokenizer
from vmae.tokenizer_training import TokenizerRun, evaluated, train_tokenizer
from vmae.videomae import read_videomae, write_videomae
from vmae.watching import watch

Video = tyro.conf.Positional[Path]


def tokenizer(
    run: tyro.conf.OmitArgPrefixes[TokenizerRun],
    evaluate: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train an adaptive tokenizer, or tell how good one is.

    Args:
        run: what to train on, and how.
        evaluate: folder of a tokenizer: train nothing, measure it on clips from the middle of the videos in --data.
        json_: print the evaluation as json.
    """
    if json_ and evaluate is None:
        raise ValueError("json: expected with --evaluate, which prints it")
    if evaluate is None:
        print(f"The tokenizer is in {train_tokenizer(run)}")
    else:
        result = evaluated(evaluate, run)
        print(json.dumps(dataclasses.asdict(result), indent=2) if json_ else table(result))


def pretrain_(
    run: tyro.conf.OmitArgPrefixes[PretrainRun],
    evaluate: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Pretrain a masked autoencoder, or tell what one has learned.

    Args:
        run: what to train on, and how.
        evaluate: folder of a model: train nothing, measure it on --val beside guesses, for every strategy's tokens.
        json_: print the evaluation as json.
    """
    if json_ and evaluate is None:
        raise ValueError("json: expected with --evaluate, which prints it")
    if evaluate is None:
        print(f"The model is in {pretrain(run)}")
    else:
        result = evaluated_mae(evaluate, run)
        print(json.dumps(dataclasses.asdict(result), indent=2) if json_ else mae_table(result))


def cache_(run: tyro.conf.OmitArgPrefixes[PretrainRun]) -> None:
    """Store what frozen models say of the videos, for `vmae pretrain` with the same settings to read.

    Can be stopped and started again, and several can fill one folder. Pretraining does the same before its first step.
    """
    print(f"{run.cache} holds all views; {cache(run)} were missing")


def convert(
    source: Video,
    out: Video,
    to: Literal["vmae", "huggingface"] = "vmae",
    frames: int | None = None,
    size: int | None = None,
) -> None:
    """Turn a model of Hugging Face's VideoMAE into one of vmae, or the other way round.

    Args:
        source: folder with config.json and model.safetensors.
        out: folder for the new model.
        to: whose model to write.
        frames: frames per clip of the model of vmae; its positions are computed for it. The source's own by default.
        size: its rows and columns, in pixels.
    """
    if any((out / name).exists() for name in (checkpoint.CONFIG, checkpoint.WEIGHTS)):
        raise ValueError(f"{out}: already holds a model; choose another folder")
    if to == "vmae":
        checkpoint.save(read_videomae(source, frames=frames, size=size), out)
    elif frames is None and size is None:
        write_videomae(checkpoint.load(VideoMAE, source), out)
    else:
        raise ValueError("frames, size: expected with --to vmae alone, whose positions they are for")
    print(f"The model is in {out}")


def probe_(run: tyro.conf.OmitArgPrefixes[ProbeRun]) -> None:
    """Tell what a pretrained encoder's frozen features say of labelled videos, beside a random encoder's and pixels."""
    print(table_of_probes(probe(run)))


def encode(
    video: Video,
    model: Path,
    out: Path,
    frames: int | None = None,
    size: int | None = None,
    stride: int = 1,
    fps: float | None = None,
    stream: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overlap: int | None = None,
    per: Per = "token",
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision = "auto",
) -> None:
    """Write a video's features: of a clip [N, D] to a safetensors file, or with --stream of all of it to a folder.

    Args:
        video: the video file.
        model: folder of a pretrained model.
        out: file to write, where only features are replaced; with --stream a folder.
        frames: frames of the clip, from the middle of the video; the model's own number if not given.
        size: rows and columns; the model's own if not given.
        stride: take every n-th frame.
        fps: sample by time at this rate instead.
        stream: encode the whole video, of any length, clip after clip; goes on where it was stopped.
        overlap: frames that neighbouring clips share, with --stream; a quarter of a clip if not given.
        per: what to keep with --stream: every token, or the mean of each latent frame (two frames of the video).
        overwrite: replace what --stream made with other settings.
        device: where to compute.
        precision: of the computation, where auto is bf16, but fp32 on CPUs that only emulate bf16; the file holds
            float32.
    """
    loaded = checkpoint.load(VideoMAE, model)
    where: dict[str, Any] = {"frames": frames, "size": size, "stride": stride, "fps": fps}
    where |= {"device": device, "precision": precision}
    if stream:
        shape = encode_long(video, loaded, out, overlap=overlap, per=per, overwrite=overwrite, **where)
    elif overlap is not None or per != "token" or overwrite:
        raise ValueError("overlap, per, overwrite: expected with --stream alone")
    else:
        shape = encode_video(video, loaded, out, **where)
    print(f"features {list(shape)} in {out}")


def show(
    video: Video,
    tokenizer: Path,
    out: Path,
    masking: tyro.conf.OmitArgPrefixes[Masking],
    model: Path | None = None,
    frames: int = 128,
    size: int = 224,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision = "auto",
) -> None:
    """Write a page that plays a video beside its scores, what each strategy selects, and what models make of it.

    Args:
        video: the video file.
        tokenizer: folder of a trained tokenizer.
        out: HTML file to write, where only such a page is replaced.
        masking: how tokens are masked.
        model: folder of a pretrained model, whose predictions are shown too.
        frames: frames of the clip, from the middle of the video.
        size: rows and columns.
        device: where to compute.
        precision: of the computation; auto is bf16, but fp32 on CPUs that only emulate bf16.
    """
    checkpoint.check_writable(out, "a page", is_page)
    loaded = checkpoint.load(AdaptiveTokenizer, tokenizer, device_of(device))
    mae = None if model is None else checkpoint.load(VideoMAE, model, device_of(device))
    shown = section(video, loaded, title=video.name, frames=frames, size=size, model=mae, precision=precision)
    page([shown], masking, out)
    print(f"page in {out}: open it in a browser")


def watch_(run: Video, every: float = 10.0) -> None:
    """Follow a training run: write its report again and again, until it has done its steps.

    The report is also there when a run ends, by itself.

    Args:
        run: folder of the run.
        every: seconds between two reports.
    """
    watch(run, every)


def doctor_(json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False) -> None:
    """Tell what this machine offers, and what will run on it.

    Args:
        json_: print json.
    """
    facts = doctor.report()
    print(json.dumps(facts, indent=2) if json_ else doctor.show(facts))


def plan_(
    step: tyro.conf.OmitArgPrefixes[Step],
    device: Annotated[Literal["here", "a100", "h100", "h200", "b200", "l40s", "rtx4090"], tyro.conf.arg()] = "here",
    memory: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Predict a pretraining step's memory, arithmetic and least time, and the largest step that fits; needs no GPU.

    Args:
        step: what to predict.
        device: what the step is to run on; "here" measures this machine for a second.
        memory: what the device has, like 80GB or 24GiB, if not what is usual.
        json_: print json.
    """
    known = None if memory is None else planning.parse_memory(memory)
    step.config()  # says what is wrong before anything is measured
    result = planning.plan(step, planning.DEVICES.get(device) or planning.this_device(), known)
    print(json.dumps(planning.facts(result), indent=2) if json_ else planning.table(result))


def bench_(
    model: Literal["auto", "tiny", "small", "base", "large"] = "auto",
    frames: int = 128,
    size: int = 224,
    budget: float = 0.15,
    precision: Precision = "auto",
    seconds: float = 60.0,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Measure pretraining steps on this machine for a minute: time and memory against frames, for a budget and for all.

    Every figure comes from a process of its own, which first compares gradients with another implementation's.

    Args:
        model: auto is base on a GPU and small on a CPU.
        frames: the longest clip.
        size: rows and columns, in pixels.
        budget: share of all tokens that the decoder reconstructs.
        precision: auto is bf16, but fp32 on CPUs that only emulate bf16.
        seconds: begin no measurement that would end later.
        json_: print json.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, got {seconds:g}")
    cuda = torch.cuda.is_available()
    preset = model if model != "auto" else "base" if cuda else "small"
    step = Step(preset, frames, size, budget, precision=precision_of(precision, device_of("auto")))
    step.config()  # says what is wrong before anything is measured
    device = planning.this_device()
    rows = []
    if not json_:
        print(bench.heading(step, device), flush=True)
    for row in bench.quick(step, device, seconds):
        rows.append(bench.facts(*row))
        if not json_:
            print(bench.line(*row, device), flush=True)
    if not rows:
        raise ValueError(f"seconds: expected enough for one measurement, got {seconds:g}; a smaller --model is faster")
    if json_:
        print(json.dumps({"device": device._asdict(), "steps": rows}, indent=2))


COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor_,
    "demo": demo,
    "tokenizer": tokenizer,
    "cache": cache_,
    "pretrain": pretrain_,
    "probe": probe_,
    "convert": convert,
    "watch": watch_,
    "encode": encode,
    "show": show,
    "plan": plan_,
    "bench": bench_,
}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command; a mistake in what was asked ends with one line and exit status 1."""
    signal.signal(signal.SIGTERM, _interrupt)  # what a scheduler sends: stop as for Ctrl-C
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="vmae", description="Long-context video masked autoencoders."
        )
        distributed.stop()
    except BrokenPipeError:  # the reader has seen enough: vmae doctor | head
        sys.stdout = None
        sys.exit(0)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:  # also VideoError and TrainingError
        print(f"vmae: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not tells_of_a_killed_worker(error):
            raise
        # Raised wherever the program happens to be when a decoding process is killed.
        print(f"vmae: error: {KILLED}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(f"\nvmae: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
