"""The other ranks of a host: started together, watched together, ended together.

A run over several processes has to end as one. Three things make that so here:

* a rank that raises hands its traceback to the launching process through a pipe, so that the user reads one
message, the
  earliest cause, and not the same traceback once a rank with "connection closed by peer" on top of it;
* a thread of the launching process notices a rank that died without a word (``kill -9``, the kernel's memory killer);
* on Linux the kernel is asked to end a rank when its launcher dies, however that happens (``PR_SET_PDEATHSIG``).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO, cast

_LAUNCHER_PID = "SQUALL_LAUNCHER_PID"
_REPORT_FD = "SQUALL_REPORT_FD"
_PR_SET_PDEATHSIG = 1
_MAX_REPORT_CHARS = 16_000  # a pipe holds 64 KiB: a longer report would block the rank that is about to die


class RankFailedError(RuntimeError):
    """Another rank of the run failed; the message says which, how, and what it said."""


def signal_name(return_code: int) -> str:
    """Describe the return code of a process in words.

    Args:
        return_code: As :attr:`subprocess.Popen.returncode`: negative for a signal.

    Returns:
        For instance ``"was killed by SIGKILL"`` or ``"ended with exit code 1"``.

    """
    if return_code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-return_code).name}"
    return f"ended with exit code {return_code}"


class Gang:
    """The processes that one launch added to the process it was called in.

    Args:
        commands: One command line per process; the first becomes local rank 1.
        environments: One environment per process.
        cwd: The folder they start in.
        ends_together: Whether one that is lost ends the others, the launching process included.

    Example:
        >>> gang = Gang([[sys.executable, "-c", "pass"]], [dict(os.environ)], cwd=None)
        >>> gang.start()
        >>> gang.wait(timeout=30.0)
        True

    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        cwd: str | None,
        ends_together: bool = True,
    ) -> None:
        self.ends_together = ends_together
        self._commands = commands
        self._environments = environments
        self._cwd = cwd
        self._pipes: list[int] = []
        self._reports: dict[int, dict[str, object]] = {}
        self._released = threading.Event()
        self._busy = False
        self.interrupted = False
        self.is_waited_for = False  # even if the launching process fails
        self.procs: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start every process, and the thread that watches them."""
        for command, environment in zip(self._commands, self._environments, strict=True):
            env = dict(environment)
            pass_fds: tuple[int, ...] = ()
            read_end = write_end = -1
            if os.name == "posix":
                read_end, write_end = os.pipe()
                os.set_blocking(read_end, False)
                pass_fds = (write_end,)
                env[_REPORT_FD] = str(write_end)
                # The kernel's signal follows the thread that started the process, and only the main one surely
                # lives on.
                if self.ends_together and threading.current_thread() is threading.main_thread():
                    env[_LAUNCHER_PID] = str(os.getpid())
            self.procs.append(subprocess.Popen(command, env=env, cwd=self._cwd, pass_fds=pass_fds))
            self._pipes.append(read_end)
            if write_end >= 0:
                os.close(write_end)
        if self.procs and self.ends_together:
            threading.Thread(target=self._watch, name="squall-gang-watch", daemon=True).start()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While in this block the launching process depends on the others, and one that dies ends it too."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def wait(self, timeout: float) -> bool:
        """Wait for every process to end by itself.

        Args:
            timeout: Seconds.

        Returns:
            Whether all have ended.

        """
        deadline = time.monotonic() + timeout
        for proc in self.procs:
            try:
                proc.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self) -> None:
        """End every process that still lives, and release the pipes. May be called twice."""
        self._released.set()
        for proc in self.procs:
            if proc.poll() is None:
                proc.kill()
        for proc in self.procs:
            proc.wait()
        self._read_reports()
        for pipe in self._pipes:
            if pipe >= 0:
                os.close(pipe)
        self._pipes = [-1] * len(self._pipes)

    def first_failure(self, own_error_at: float | None = None, patience: float = 0.0) -> str | None:
        """Say which rank failed first, if it was one of these.

        Args:
            own_error_at: :func:`time.time` at which the launching process itself failed; a rank that failed after that
                is not the cause of it.
            patience: Seconds to wait for the sign of a failure, since a peer's closed connection is often seen before
                the peer is gone.

        Returns:
            A message for the user, or None when no rank is to blame.

        """
        deadline = time.monotonic() + patience
        while True:
            self._read_reports()
            codes = {rank: proc.poll() for rank, proc in enumerate(self.procs, start=1)}
            ended = {rank: code for rank, code in codes.items() if code}
            for rank, code in ended.items():
                if code < 0 and rank not in self._reports:  # nobody who is killed has time to report
                    return (
                        f"Rank {rank} (process {self.procs[rank - 1].pid}) {signal_name(code)}; the run ends with it."
                    )
            if self._reports:
                rank, report = min(self._reports.items(), key=lambda item: float(str(item[1]["time"])))
                if own_error_at is None or float(str(report["time"])) <= own_error_at:
                    return f"Rank {rank} raised {report['summary']}\n\nIts traceback:\n\n{report['traceback']}"
                return None
            for rank, code in ended.items():
                what = signal_name(code)
                return f"Rank {rank} (process {self.procs[rank - 1].pid}) {what}; what it wrote is above."
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def _read_reports(self) -> None:
        for rank, pipe in enumerate(self._pipes, start=1):
            if pipe < 0 or rank in self._reports:
                continue
            with contextlib.suppress(BlockingIOError, ValueError):
                text = os.read(pipe, 4 * _MAX_REPORT_CHARS)
                if text:
                    self._reports[rank] = json.loads(text)

    def _watch(self, period: float = 0.3, grace: float = 5.0) -> None:
        """End this process when a rank is gone and the main thread can't notice, as in a rendezvous it waits in."""
        while not self._released.wait(period):
            if not self._busy or not any(proc.poll() for proc in self.procs):
                continue
            # As a rule the main thread hears of it: its connection to that rank closes, and the collective raises.
            if self._released.wait(grace) or not self._busy:
                continue
            message = self.first_failure()
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h\n")  # a progress bar may have hidden the cursor
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()
            self.kill()
            os._exit(1)


class Membership:
    """What a process knows of the gang it belongs to, when another process started it."""

    def __init__(self) -> None:
        # Taken out of the environment so that this process's own children don't take themselves for ranks.
        self._report_fd = int(os.environ.pop(_REPORT_FD, "-1"))
        launcher = int(os.environ.pop(_LAUNCHER_PID, "0"))
        if self._report_fd >= 0:
            os.set_inheritable(self._report_fd, False)
        if launcher and sys.platform.startswith("linux"):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # it was gone before the request was in
                os._exit(1)

    @property
    def started_by_launcher(self) -> bool:
        """Whether this process is a rank that a launcher of Squall started."""
        return self._report_fd >= 0

    def report(self, error: BaseException) -> None:
        """Hand an error to the launching process, and keep this process from printing it too.

        Args:
            error: What ended the work of this rank. Only the first one is reported.

        """
        text = _own_traceback(error)[-_MAX_REPORT_CHARS // 2 :]
        summary = f"{type(error).__name__}: {error}"[: _MAX_REPORT_CHARS // 4]
        with contextlib.suppress(OSError):
            record = {"time": time.time(), "summary": summary, "traceback": text}
            os.write(self._report_fd, json.dumps(record).encode())
        _mute(error)


def _own_traceback(error: BaseException) -> str:
    """Format the traceback, less the frames inside torch and Lightning on the way to the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = (f"{os.sep}torch{os.sep}", f"{os.sep}lightning{os.sep}", __file__, "launching.py")
    kept = [frame for frame in frames[:-1] if not any(part in frame.filename for part in foreign)] + frames[-1:]
    return "".join(traceback.format_list(kept) + traceback.format_exception_only(error))


def _mute(error: BaseException) -> None:
    """Let `error` end this process with exit code 1 and no second traceback, should nobody catch it."""
    previous_hook, previous_stderr = sys.excepthook, sys.stderr

    def hook(kind: type[BaseException], value: BaseException, tb: object) -> None:
        if value is not error:
            previous_hook(kind, value, tb)  # type: ignore[arg-type]

    class _WithoutHydrasLine:
        """Hydra names the overrides of a failed job on stderr, whatever hook is set; the launching rank does so too."""

        def write(self, text: str) -> int:
            return len(text) if text.startswith("Error executing job") else previous_stderr.write(text)

        def __getattr__(self, name: str) -> object:
            return getattr(previous_stderr, name)

    sys.excepthook = hook
    sys.stderr = cast(TextIO, _WithoutHydrasLine())


membership = Membership()
