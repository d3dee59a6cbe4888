"""The files of the service are those of its user alone."""

import os
import stat
import subprocess
from pathlib import Path

from app.programs import command


def test_the_files_of_the_service_are_its_users_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    environment = os.environ | {"DPO_HOME": str(home)}
    subprocess.run(command("app.cli.main", "migrate"), env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command("app.cli.main", "storage", "prune"), env=environment, check=True, stdout=subprocess.DEVNULL)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.rglob("*"))}
    assert any(path.name == "dpo.sqlite3" for path in modes)
    wrong = {str(path): oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)}
    assert not wrong
