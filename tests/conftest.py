"""What every test shares: no network, no display, caches in a folder of the test run."""
import os
import tempfile
from pathlib import Path

# Set before anything imports these libraries. setdefault: a caller's own choice stands.
_quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
          "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1))}
for name, value in _quiet.items(): os.environ.setdefault(name, value)

_scratch = None
if "RADCLIP_CACHE" not in os.environ:  # a test must not meet yesterday's cache, nor leave one in the user's home
    _scratch = tempfile.TemporaryDirectory(prefix="radclip-tests-", ignore_cleanup_errors=True)
    os.environ["RADCLIP_CACHE"] = str(Path(_scratch.name) / "cache")


def pytest_report_header(config):
    data = os.environ.get("RADCLIP_DATA")
    return "real data: " + (data if data else "RADCLIP_DATA is not set, tests that read real pairs are skipped")


def pytest_unconfigure(config):
    if _scratch is not None: _scratch.cleanup()
