"""Guard: starts one rank as its child and outlives it. Run by path, with ``python -S -E``; imports nothing of the package.

    python -S -E guard.py RUN MEMBER [NAME=VALUE...] COMMAND...

MPICH's launcher ends the whole job when a process that it started is gone without closing its PMI session. It starts this
guard instead, and the guard closes the session in the place of a rank that died. The death is written to the run directory,
where the other ranks see it. NAME=VALUE sets variables of the rank's environment, as in env(1).
"""

import os
import signal
import sys


def close_pmi_session():
    """Say to the launcher that this process is finished, as the dead rank can't any more (PMI-1 wire protocol)."""
    descriptor = os.environ.get("PMI_FD")
    if descriptor is None:
        return
    try:
        os.write(int(descriptor), b"cmd=finalize\n")
        os.read(int(descriptor), 1024)
    except OSError:
        pass


def record_death(run, member, pid, how):
    """Write the run's failure, unless a rank has written one."""
    import json  # only now: a rank that ends well should not pay for it

    error = f"process {member} (pid {pid} on {os.uname().nodename}) {how}"
    beside = os.path.join(run, f".failure.guard.{os.getpid()}")
    place = os.path.join(run, "failure.json")
    failure = dict(error=error, traceback="", member=member, rank=-1, host=os.uname().nodename, generation=-1, step=-1)
    try:
        with open(beside, "x") as file:
            json.dump(failure, file)
        try:
            os.link(beside, place)
        except FileExistsError:
            pass
        os.unlink(beside)
    except OSError as problem:
        sys.stderr.write(f"hpc_elastic guard: {error}; could not be recorded in {run}: {problem}\n")


def main():
    run, member, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    while "=" in command[0]:
        name, value = command.pop(0).split("=", 1)
        os.environ[name] = value
    pid = os.fork()
    if pid == 0:
        try:
            os.execvp(command[0], command)
        except OSError as problem:
            sys.stderr.write(f"hpc_elastic guard: {command[0]}: {problem.strerror}\n")
            os._exit(127)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: os.kill(pid, received))
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        record_death(run, member, pid, how)
        close_pmi_session()
    os._exit(code if code >= 0 else 128 - code)


main()
