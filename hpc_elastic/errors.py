"""The tree of everything hpc_elastic raises.

    ElasticError
    ├── ConfigError            a setting is unknown, missing or contradicts another
    ├── RunDirectoryError      the run directory can't be made, is in use, or is not one
    ├── LaunchError            no MPI library, no mpiexec, or the script can't be started
    ├── ShardError             a shard is missing, truncated, foreign or unlike the others
    ├── CheckpointError        a checkpoint is missing, damaged, or of another job
    ├── StepError              a step was used against its order (a microbatch not added, added twice)
    ├── ArrayError             a distributed array was used wrongly
    ├── ResizeRefused          a resize can't be done, and why
    ├── SlurmError             Slurm was asked or told something without success
    │   ├── SlurmMissing       no commands of Slurm, or no configuration of a cluster
    │   ├── SlurmUnreachable   slurmctld or munge is down or too slow: worth another try
    │   └── SlurmRefused       Slurm said no (partition, account, QOS, limits, no nodes in time)
    └── JobError               the job can't go on; every rank raises the same
        ├── RankError          user code raised on one rank
        ├── LostRank           a rank died or stalled where the job can't go on without it
        └── MembershipError    ranks could not be brought together or parted

    Retired (a BaseException)  this rank leaves the job: it unwinds the user's code and must not be swallowed
    Rewound (a BaseException)  a rank was lost: the user's function is left, and entered again where the state was kept

Messages say what happened, where (rank, host, generation, step), and what can be done about it.
"""

from __future__ import annotations


class ElasticError(Exception):
    """Base of all errors of this package."""


class ConfigError(ElasticError):
    """A setting is unknown, missing, out of range or contradicts another one."""


class RunDirectoryError(ElasticError):
    """The run directory can't be made, is already used, or is not a run directory."""


class LaunchError(ElasticError):
    """The job can't be started: no MPI library, no mpiexec, or no such script."""


class ShardError(ElasticError):
    """A shard is missing, truncated, foreign or does not match the others of its set."""


class CheckpointError(ElasticError):
    """A checkpoint is missing, damaged, or does not fit the job."""


class StepError(ElasticError):
    """A step was used against its order."""


class ArrayError(ElasticError):
    """A distributed array was asked for something it can't give."""


class ResizeRefused(ElasticError):  # noqa: N818  (an answer more than an error)
    """A resize can't be done; the message gives the reason."""


class SlurmError(ElasticError):
    """Slurm was asked or told something, without success."""


class SlurmMissing(SlurmError):  # noqa: N818  (what is the matter)
    """There are no commands of Slurm here, or no configuration of a cluster."""


class SlurmUnreachable(SlurmError):  # noqa: N818  (what is the matter)
    """slurmctld or munge is down, or didn't answer in time. It is worth another try later.

    What was told may have been done all the same: only the answer is known to be missing.
    """


class SlurmRefused(SlurmError):  # noqa: N818  (an answer more than an error)
    """Slurm said no; the message has its words and what to do about it."""


class JobError(ElasticError):
    """The job can't go on. Every rank raises the same error."""


class RankError(JobError):
    """User code raised on one rank; the message names rank, host, generation and step."""


class LostRank(JobError):  # noqa: N818  (what happened)
    """A rank died or stalled, and the job can't go on without it: it restarts from its last checkpoint if supervised."""


class MembershipError(JobError):
    """Ranks could not be brought together or parted."""


class Retired(BaseException):
    """Leave the job: raised in a rank that has to go.

    Raised inside the user's function at a resize point. It derives from `BaseException` so that an ``except Exception``
    in user code does not keep a leaving rank alive; ``finally`` blocks and context managers run as usual.
    """


class Rewound(BaseException):
    """Begin again: a rank was lost, and the job goes on from a state that was kept.

    Raised inside the user's function, which is then called once more, in the same process. Like `Retired`, it derives from
    `BaseException`.
    """
