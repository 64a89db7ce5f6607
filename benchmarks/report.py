"""What a comparison leaves behind: a JSON file with everything and a Markdown table to read."""

import datetime
import json
import math
import os
import platform
import subprocess
from pathlib import Path

import packseq
import torch


def environment(commit: str | None) -> dict[str, str]:
    """Machine and versions. `commit` overrules what the library says it was built from."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "packseq": packseq.__version__,
        "commit": commit or packseq._C.commit or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def markdown(rows: list[dict]) -> str:
    """A table of rows that share their keys; None shows as nothing."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[cell(row[key]) for key in header] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(out: str | None, name: str, title: str, env: dict, rows: list[dict], summary: list[str]) -> None:
    """Prints the report, and puts NAME.json and NAME.md into the folder `out`."""
    text = f"# {title}\n\n"
    text += "".join(f"- {key}: {value}\n" for key, value in env.items())
    text += "\n" + "\n".join([markdown(rows), *summary]).rstrip() + "\n"
    print("\n" + text)
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text)
        record = {"title": title, "environment": env, "rows": rows, "summary": summary}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
