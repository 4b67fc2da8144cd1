"""Run the quickstart as users do, for benchmarks that look at what it reports."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN_FILE = Path(__file__).parent.parent / "quickstart.yaml"


def run_quickstart(*options: str) -> dict[str, Any]:
    """`swarm run` with these options, to its end; what its summary.json holds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainers.cli", "run", str(RUN_FILE), "--folder", folder]
        result = subprocess.run(
            [*command, "--set", "monitor.wandb=disabled", *options],
            capture_output=True,
            text=True,
            check=False,
        )
        path = Path(folder) / "quickstart" / "summary.json"
        if result.returncode or not path.exists():
            raise SystemExit(f"the run failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary
