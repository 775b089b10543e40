"""Agent of a companion: starts newcomers there, and ends the companion when the job needs it no more.

    python -I -S agent.py --step RUN N QUIET_S      a step of companion N, an allocation of one node (`hpc_elastic.starter`)
    python -I -S agent.py RUN N QUIET_S             the script of companion N, a batch job of one node
    python -I -S agent.py RUN own QUIET_S           beside the supervisor, for the job's own host: nothing ends with it
    python -I -S agent.py --sentinel RUN N          a step in that, which is told when the companion is to go

Run by path, it imports nothing of the package; `keeper` it loads by its path. The companion ends with it, and nobody else
has to be there for that: with its script, or by the agent's own word to Slurm. In the run directory, below ``companions``,
it

- writes ``N.held.json``: where it is, and what it may use; then touches ``N.beat`` four times a second, as its sign of life;
- runs what ``N/MEMBER.json`` says, a command and its environment: the guard of a newcomer; where that can't be started, it
  says so in the guard's place, for whom the leader would wait;
- sees to it that this host has a warm parent (`hpc_elastic.warm`), if the leader has written what that imports;
- makes ``N.term`` when Slurm sends SIGTERM, as it does to steps, and not to batch scripts, before it takes the node away;
- ends, once no guard is left, when ``N.release`` is there, or the job has ended; and in any case when no rank of the job has
  given a sign of life for ``QUIET_S`` seconds, or the run directory is gone. ``N.end`` says why.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from _json import encode_basestring_ascii as quoted  # json itself takes some ms to import, and the job waits for this

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

    from hpc_elastic.keeper import Keeper

POLL_S, LOOK_S = 0.005, 0.25
GRACE_S = 5.0  # for guards to end their ranks
LONGEST_PAUSE_S = 8.0  # between tries to have Slurm end the companion
GPUS = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "GPU_DEVICE_ORDINAL")
LEFT = ("ended", "stopped")
UNBORN = 127  # a shell's exit code for what can't be started


class Agent:
    """The agent of one companion."""

    def __init__(self, run: str, number: str, quiet_s: float, *, is_step: bool = False) -> None:
        self.run, self.number, self.quiet_s, self.is_step = run, number, quiet_s, is_step
        self.orders = os.path.join(run, "companions", number)
        self.guards: dict[int, subprocess.Popen[bytes]] = {}
        self.sentinel: subprocess.Popen[bytes] | None = None
        self.ending = False  # it was told to end
        self.seen: dict[str, float] = {}
        self.quiet_since = time.monotonic()
        self.keeper: Keeper | None = None  # of this host's warm parent, if the job has some

    def file(self, kind: str) -> str:
        """Return the path of what this agent says, or is told."""
        return os.path.join(self.run, "companions", f"{self.number}.{kind}")

    def put(self, path: str, text: str) -> None:
        """Write a file so that it is there whole, or not at all."""
        folder, name = os.path.split(path)
        beside = os.path.join(folder, f".{name}.{os.getpid()}")
        with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        os.rename(beside, path)

    def serve(self) -> str:
        """Serve until the companion is needed no more, and return why."""
        os.makedirs(self.orders, mode=0o700, exist_ok=True)
        node = os.environ.get("SLURMD_NODENAME", "")
        gpus = next((os.environ[name] for name in GPUS if os.environ.get(name)), "")
        held = (
            f'{{"host":{quoted(os.uname().nodename)},"node":{quoted(node)},'
            f'"allocation":{quoted(os.environ.get("SLURM_JOB_ID", ""))},"gpus":{quoted(gpus)},'
            f'"pid":{os.getpid()},"time":{time.time()}}}'
        )
        if self.number == "own":
            self.forget()
        elif self.is_step:
            signal.signal(signal.SIGTERM, self.note_term)
            out = os.open(self.file("out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
        else:
            self.watch_for_term(node)
        self.put(self.file("held.json"), held)
        next_look = 0.0
        while not self.ending:
            self.obey()
            self.bury()
            if not self.guards and os.path.exists(self.file("release")):
                return "it was given back"
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                why = self.look()
                if why:
                    return why
            time.sleep(POLL_S)
        return "it was told to end"

    def end_soon(self, *_: object) -> None:
        """Have it end, but not while it starts somebody: who was not noted down yet would be left behind."""
        self.ending = True

    def forget(self) -> None:
        """Remove what the agent of an attempt before has left."""
        for path in (self.file("end"), *(os.path.join(self.orders, name) for name in os.listdir(self.orders))):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def note_term(self, *_: object) -> None:
        """Say that Slurm has told the companion to go: the ranks have a while to leave."""
        say_term(self.run, self.number)

    def watch_for_term(self, node: str) -> None:
        """Start the step that Slurm tells."""
        if not node:
            return  # not in Slurm: a test
        import subprocess

        step = ["srun", "--overlap", "--quiet", "--ntasks=1", "--nodes=1", "--nodelist", node, "--mem=0", "--gres=none"]
        mine = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--sentinel", self.run, self.number]
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_CPU", "SLURM_MEM", "SLURM_TRES"))
        }
        try:
            self.sentinel = subprocess.Popen([*step, *mine], stdin=subprocess.DEVNULL, env=environ)
        except OSError as problem:
            print(f"hpc_elastic: no step on {node}, so nobody will say when the companion is to go: {problem}", flush=True)

    def obey(self) -> None:
        """Start what is to be started."""
        import json
        import subprocess

        try:
            names = os.listdir(self.orders)
        except OSError:
            return
        for name in names:
            stem, kind = os.path.splitext(name)
            if self.ending:
                return
            if kind != ".json" or not stem.isdigit():
                continue
            path = os.path.join(self.orders, name)
            try:
                with open(path, "rb") as file:
                    content = file.read()
                os.unlink(path)
            except FileNotFoundError:
                continue  # it was taken back
            try:
                order = json.loads(content)
                self.guards[int(stem)] = subprocess.Popen(order["command"], env=order["environ"], stdin=subprocess.DEVNULL)
            except (OSError, ValueError, KeyError) as problem:
                print(f"hpc_elastic: newcomer {stem} could not be started: {problem}", flush=True)
                self.record(int(stem), f"its guard could not be started: {problem}")

    def record(self, member: int, words: str) -> None:
        """Write down that a newcomer has come to nothing, as its guard would."""
        text = (
            f'{{"member":{member},"pid":0,"host":{quoted(os.uname().nodename)},"code":{UNBORN},"signal":0,'
            f'"time":{time.time()},"peak_bytes":0,"last_words":{quoted(words)}}}'
        )
        try:
            self.put(os.path.join(self.run, "ranks", f"{member}.end.json"), text)
        except OSError:
            pass  # the run directory is gone, or full

    def bury(self) -> None:
        """Forget guards that have ended."""
        for number, guard in list(self.guards.items()):
            if guard.poll() is not None:
                del self.guards[number]

    def look(self) -> str:
        """Give a sign of life; return why the companion ends, or nothing."""
        try:
            with open(self.file("beat"), "a", encoding="ascii"):
                os.utime(self.file("beat"))
        except OSError:
            if not os.path.isdir(self.run):
                return "the run directory is gone"
        if self.quiet():
            return f"no rank has given a sign of life for {self.quiet_s:g} s"
        over = "" if self.guards else self.over()
        if not over:
            self.keep_warm()
        return over

    def keep_warm(self) -> None:
        """Start this host's warm parent, if the job has some and it is not there; it ends by itself, or with the agent."""
        if self.keeper is None:
            if not os.path.exists(os.path.join(self.run, "warm", "spec.json")):
                return
            self.keeper = load_keeper(self.run)
        problem = self.keeper.start() if self.keeper.due() else ""
        if problem:
            print(f"hpc_elastic: {problem}", flush=True)

    def over(self) -> str:
        """Return why the job needs nobody any more, or nothing."""
        import json

        for name, key, values in (("status.json", "state", ("ended", "stopped")), ("failure.json", "kind", ("error",))):
            try:
                with open(os.path.join(self.run, name), encoding="utf-8") as file:
                    value = json.load(file)[key]
            except (OSError, ValueError, KeyError):
                continue
            if value in values:
                return "the job has ended" if name == "status.json" else "the job has failed"
        return ""

    def quiet(self) -> bool:
        """Tell whether no rank has given a sign of life for too long, by this host's clock."""
        folder, found = os.path.join(self.run, "ranks"), {}
        try:
            for entry in os.scandir(folder):
                if entry.name.endswith(".beat"):
                    found[entry.name] = entry.stat().st_mtime
        except OSError:
            found = self.seen  # no word from the file system is no sign of life, either
        now = time.monotonic()
        if found != self.seen:
            self.seen, self.quiet_since = found, now
        return now - self.quiet_since > self.quiet_s

    def end(self, why: str) -> None:
        """End all that was started here, and say why."""
        import subprocess

        for guard in self.guards.values():
            guard.terminate()
        deadline = time.monotonic() + GRACE_S
        for guard in self.guards.values():
            try:
                guard.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                guard.kill()
        if self.keeper is not None:
            self.keeper.end()  # not before, as the guards ask it how their ranks have ended
        if self.sentinel is not None:
            self.sentinel.terminate()
        try:
            self.put(self.file("end"), why)
        except OSError:
            pass  # the run directory is gone
        if self.is_step:
            self.give_up()

    def let_go(self) -> None:
        """End each ``srun`` here whose step is another companion's agent, so that it goes on when this companion ends.

        srun's second process would end the step, if it saw the first one go.
        """
        folder, host = os.path.join(self.run, "companions"), os.uname().nodename
        for name in os.listdir(folder):
            stem, kind = os.path.splitext(name)
            if kind != ".step" or os.path.exists(os.path.join(folder, f"{stem}.end")):
                continue
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    pid, where = file.read().split(" ", 1)
                with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                    words = file.read().split("\0")
                if where != host or self.run not in words:
                    continue
                with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
                    others = file.read().split()
                for each in (*others, pid):
                    os.kill(int(each), signal.SIGKILL)
            except (OSError, ValueError):
                continue  # it has ended

    def give_up(self) -> None:
        """Have Slurm end the companion, and this step with it; slurmctld may be away for a while."""
        import subprocess

        try:
            self.let_go()
        except OSError:
            pass  # the run directory is gone
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        pause_s = 0.25
        while True:
            done = subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=False, capture_output=True)
            if done.returncode == 0 or b"nvalid job id" in done.stderr:
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def load_keeper(run: str) -> Keeper:
    """Return who keeps the warm parent."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("keeper", os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    keeper: Keeper = module.Keeper(run)
    return keeper


def say_term(run: str, number: str) -> None:
    """Make the file that says that Slurm has told the companion to go."""
    try:
        os.close(os.open(os.path.join(run, "companions", f"{number}.term"), os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        pass


def sentinel(run: str, number: str) -> None:
    """Say so when SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: say_term(run, number))
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)


def main() -> None:
    """Be the agent, or its sentinel."""
    arguments = sys.argv[1:]
    if arguments[0] == "--sentinel":
        sentinel(arguments[1], arguments[2])
        return
    run, number, quiet_s = arguments[-3:]
    agent = Agent(run, number, float(quiet_s), is_step=arguments[0] == "--step")
    signal.signal(signal.SIGTERM, agent.end_soon)
    why = "its agent has failed"
    try:
        why = agent.serve()
    finally:
        agent.end(why)


if __name__ == "__main__":
    main()
