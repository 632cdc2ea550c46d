"""Lays vmae_kernels out as a repository of Hugging Face's Kernel Hub.

    python kernels/hub.py FOLDER

FOLDER/build/torch-cpu and FOLDER/build/torch-cuda hold the package, the same files in both, with metadata.json; the
card is FOLDER/README.md. Load it with `kernels.get_local_kernel(FOLDER)`.

Source: the kernel requirements of the `kernels` package, version 0.17.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

NAME = "vmae-kernels"
VERSION = 0  # "not yet stable", in the Hub's counting
PACKAGE = Path(__file__).parent / "vmae_kernels"
ARCHITECTURES = {"cpu": None, "cuda": ["8.0", "9.0", "10.0", "12.0"]}  # those that resources.py compiles for

CARD = """---
library_name: kernels
license: apache-2.0
---

"""

# Older versions of `kernels` import the package from a folder of its name. It is the same module, since its operations
# can be registered only once.
ONE_FURTHER_DOWN = '''"""The package one folder up."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
__all__ = sys.modules["{id}"].__all__
globals().update({{name: getattr(sys.modules["{id}"], name) for name in __all__}})
'''


def lay_out(folder: Path) -> None:
    """Write both variants and the card; what stood in their places is gone."""
    files = {path.name: path.read_bytes() for path in sorted(PACKAGE.glob("*.py"))}
    digest = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
    for backend, architectures in ARCHITECTURES.items():
        # Also the namespace of the operations: other versions in the same process have other ones.
        unique = f"_{NAME.replace('-', '_')}_{backend}_{digest[:8]}"
        below = f"{NAME.replace('-', '_')}/__init__.py"
        variant = files | {below: ONE_FURTHER_DOWN.format(id=unique).encode()}
        hashes = {name: _sha256(content) for name, content in variant.items()}
        metadata = {
            "name": NAME,
            "id": unique,
            "version": VERSION,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend} | ({"archs": architectures} if architectures else {}),
            "digest": {"algorithm": "sha256", "files": hashes},
        }
        variant["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        target = folder / "build" / f"torch-{backend}"
        shutil.rmtree(target, ignore_errors=True)
        for name, content in variant.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    (folder / "README.md").write_text(CARD + (PACKAGE.parent / "README.md").read_text())


def _sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kernels/hub.py FOLDER")
    try:
        lay_out(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"hub: error: {error}")
    print(f"{sys.argv[1]}: build/torch-cpu, build/torch-cuda, README.md")
