"""``make gpu`` and ``make gpu-kit``: all that a GPU can tell of this project, on a machine without a network.

``kit`` is run where there is a network: it gathers in a folder, build/gpu-kit, what the other machine may lack: wheels
and recorded routing. ``run`` is run on the machine with the GPU, with its own Python: it installs from that folder what
is missing, into a folder of its own, then runs the tests of CUDA, once more with PyTorch's sanitizer, and the sweep
(`workbench.bench.device_sweep`), and leaves records and a page. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
MOST_BYTES, MOST_TREE_BYTES = 10_000_000, 64 * 2**20
# What the run imports beyond torch, transformers, accelerate, safetensors, numpy, pandas and pytest and what these
# bring along: distribution by module.
NEEDED = {
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "xxhash": "xxhash",
    "psutil": "psutil",
    "yaml": "pyyaml",
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
STARTED = "EMOE_GPU_STARTED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=BUILD / "gpu-kit", help="folder of what the machine may lack")
    parts = parser.add_subparsers(dest="command", required=True)
    kit = parts.add_parser("kit", help="gather what the machine with the GPU lacks")
    kit.add_argument("--python", default="3.12", help="its Python")
    kit.add_argument(
        "--no-routing", action="store_true", help="leave recorded routing out (it takes minutes to record)"
    )
    run = parts.add_parser("run", help="test and measure there")
    run.add_argument("--device", default="cuda", help="or cuda:1; cpu and simulated rehearse")
    run.add_argument("--sweep", type=Path, default=ROOT / "sweeps" / "gpu.yaml")
    run.add_argument("--out", type=Path, help="build/gpu if not given; a rehearsal goes beside it")
    run.add_argument("--minutes", type=float, default=7.5, help="begin nothing that would end later")
    run.add_argument("--no-tests", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "kit":
        return make_kit(arguments)
    if arguments.out is None:
        arguments.out = BUILD / ("gpu" if arguments.device.startswith("cuda") else f"gpu-rehearsal-{arguments.device}")
    return run_all(arguments) if STARTED in os.environ else begin(arguments)


def make_kit(arguments: argparse.Namespace) -> int:
    """Download the wheels, bring recorded routing, and say how large both are."""
    kit = arguments.kit
    kit.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    options += ["--python-version", arguments.python, "-c", str(ROOT / "constraints.txt"), "-d", str(kit)]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    for wheel in kit.glob("*.whl"):
        wheel.unlink()
    code = subprocess.run([sys.executable, "-m", "pip", "download", *options, *NEEDED.values()], check=False).returncode
    if code:
        return code
    if not arguments.no_routing:
        sys.path.insert(0, str(ROOT))
        from workbench.replay.recorded_routing import recorded_trace, trace_file

        say("recorded routing of the reference model, recorded where it is not cached ...")
        recorded_trace("reference", lambda done, total: say(f"  {done} of {total} prompts"))
        shutil.copy(trace_file("reference"), kit)
    size = sum(file.stat().st_size for file in kit.iterdir())
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    tree = size + sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name)
    say(f"{kit}: {size / 1e6:.1f} MB, with the tracked files {tree / 2**20:.1f} MiB")
    if size > MOST_BYTES or tree > MOST_TREE_BYTES:
        say(f"that is more than {MOST_BYTES / 1e6:.0f} MB, or than {MOST_TREE_BYTES / 2**20:.0f} MiB")
        return 1
    return 0


def run_all(arguments: argparse.Namespace) -> int:
    """Test, measure, and write the page."""
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        say("no GPU: PyTorch finds no CUDA device here. Run this where there is one, or rehearse with DEVICE=cpu.")
        return 2
    from emoe_core.errors import EmoeError
    from workbench.bench.device_sweep import run_device_sweep
    from workbench.replay.recorded_routing import trace_file

    out, recorded = arguments.out, trace_file("reference")
    out.mkdir(parents=True, exist_ok=True)
    if (arguments.kit / recorded.name).exists() and not recorded.exists():
        recorded.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments.kit / recorded.name, recorded)
    tested = arguments.no_tests or run_tests(out, on_cuda=torch.cuda.is_available())
    left = arguments.minutes - (time.time() - float(os.environ[STARTED])) / 60
    try:
        found = run_device_sweep(arguments.sweep, arguments.device, out, left, say)
    except EmoeError as error:
        say(str(error))
        return 2
    say(f"{found.recorded} runs are recorded, {found.failed} failed, {found.left} are left. Page: {found.page}")
    say(f"Into MLflow, where that is installed: emoe results import {out / 'runs'}")
    return 0 if tested and not found.failed else 1


def begin(arguments: argparse.Namespace) -> int:
    """Install from the kit, without a network, what this Python lacks, and start anew where it is found."""
    site = arguments.out / "site"
    sys.path.append(str(site))
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    options = ["--quiet", "--no-index", "--no-deps", "--find-links", str(arguments.kit), "--target", str(site)]
    if missing:
        say(f"installing {', '.join(missing)} into {site} ...")
        if subprocess.run([sys.executable, "-m", "pip", "install", *options, *missing], check=False).returncode:
            say(f"{arguments.kit} lacks what is missing here: make it by `make gpu-kit` where there is a network.")
            return 2
    paths = [str(ROOT), *([str(site)] if site.exists() else []), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {STARTED: str(time.time()), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


def run_tests(out: Path, on_cuda: bool) -> bool:
    """Run the tests marked cuda where that is not done, with the sanitizer too on CUDA; tell whether all passed."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    from workbench.machine.environment import PROJECT, code_hash

    code, passed = code_hash([PROJECT / "emoe_core", PROJECT / "tests"]), True
    # Of pytest's plugins none is needed, and any may be broken there.
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ways: dict[str, dict[str, str]] = {"tests": {}}
    if on_cuda:
        ways["tests-sanitizer"] = {"TORCH_CUDA_SANITIZER": "1"}
    for name, extra in ways.items():
        marker = out / f"{name}.passed"
        if marker.exists() and marker.read_text() == code:
            continue
        say(f"{name} ...")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        command += [f"--junitxml={out / name}.xml", *files]
        if subprocess.run(command, cwd=ROOT, env=env | extra, check=False).returncode:
            passed = False
        else:
            marker.write_text(code)
    return passed


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
