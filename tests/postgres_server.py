"""A PostgreSQL server of the tests' own: on loopback, in a temporary folder, gone at the end.

The programs are Debian's package postgresql, or whatever is on PATH. PostgreSQL does not run as root: then it is user
postgres who runs it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

MISSING = "needs the server programs of PostgreSQL (Debian package postgresql), and there are none"


def find_programs() -> Path | None:
    """The folder with initdb and pg_ctl, of the newest version; None if there is none."""
    on_path = shutil.which("pg_ctl")
    packaged = [path for path in Path("/usr/lib/postgresql").glob("*/bin/pg_ctl") if path.parent.parent.name.isdigit()]
    newest = max(packaged, key=lambda path: int(path.parent.parent.name), default=None)
    found = newest or (Path(on_path) if on_path else None)
    return found.parent if found and (found.parent / "initdb").exists() else None


class PostgresServer:
    """A server that is running; `dsn` leads to it."""

    def __init__(self, programs: Path, folder: Path, user: str | None) -> None:
        self._programs = programs
        self._folder = folder
        self._user = user
        self.port = _free_port()
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @classmethod
    @contextmanager
    def running(cls, *, durable: bool = False) -> Iterator[Self]:
        """Make a server and run it; a durable one waits for the disk at each commit."""
        programs = find_programs()
        assert programs is not None, MISSING
        user = "postgres" if os.geteuid() == 0 else None
        folder = Path(tempfile.mkdtemp(prefix="cano-postgres-"))
        server = cls(programs, folder, user)
        try:
            if user is not None:
                os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
            server._create(durable=durable)
            server.start()
            yield server
        finally:
            server.stop("immediate")
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        self._control("start", "-w")

    def stop(self, mode: str = "fast") -> None:
        self._control("stop", "-w", "-m", mode, check=False)

    def restart(self, mode: str = "fast") -> None:
        self._control("restart", "-w", "-m", mode)

    def _create(self, *, durable: bool) -> None:
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        settings = [
            f"port = {self.port}",
            "listen_addresses = '127.0.0.1'",
            "unix_socket_directories = ''",
            "max_connections = 100",
            "wal_writer_delay = 10s",  # so that what nobody waits for does not reach the disk by itself
            f"fsync = {'on' if durable else 'off'}",
        ]
        with (self._folder / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\n".join([*settings, ""]))

    def _control(self, action: str, *options: str, check: bool = True) -> None:
        self._run("pg_ctl", action, *options, "--log", str(self._folder / "server.log"), check=check)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        done = subprocess.run(  # noqa: S603 - the programs are those of the machine
            [self._programs / program, "--pgdata", self._folder, *arguments],
            user=self._user,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{program} failed:\n{done.stdout}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
