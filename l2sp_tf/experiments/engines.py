"""Computes the runs of an experiment in this process, one after the other, or on a Ray cluster."""

from l2sp_tf.files.errors import InputError

ENGINES = ("local", "ray")
RETRIES = 3


def run_jobs(function, jobs, *, engine="local", cpus=1, gpus=0, say=print):
    """Calls a function with each job, and returns the results in the order of the jobs.

    With "ray", jobs run in parallel as far as the cluster has room. If a worker dies, its job is retried up to 3 times.
    A job that raises is not retried; the other jobs finish, then the first error is raised. The cluster is the one at
    `RAY_ADDRESS`, or a local one on this machine.

    Args:
        function: takes one job; importable by name. It writes its results to a disk that all workers share.
        jobs: a list of picklable values.
        engine: "local" or "ray".
        cpus, gpus: resources of each job; fractions of a GPU are allowed.
        say: called with a line of text whenever Ray finishes a job.

    Raises:
        InputError: the engine is unknown or not installed, no machine of the cluster has the resources, or a worker
            died too often.
    """
    if engine not in ENGINES:
        raise InputError(f"The engine {engine!r} is unknown: give one of {', '.join(ENGINES)}.")
    if engine == "local":
        return [function(job) for job in jobs]
    return _run_on_ray(_ray(), function, jobs, cpus, gpus, say)


def _ray():
    try:
        import ray
    except ImportError as error:
        raise InputError('The engine ray is not installed: run pip install "l2sp-tf[ray]", or give engine=local.') from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray


def _run_on_ray(ray, function, jobs, cpus, gpus, say):
    if not any(node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus for node in _nodes(ray)):
        raise InputError(f"No machine of the Ray cluster has {cpus} CPUs and {gpus} GPUs: ask for less per run.")
    # a worker reuses its prepared start for the next job; Ray retries a job only if its worker died
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(lambda job: function(job))
    remote = remote.options(name="l2sp_tf")
    places = {remote.remote(job): place for place, job in enumerate(jobs)}
    results, errors, waiting = [None] * len(jobs), {}, list(places)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        try:
            results[places[done]] = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            errors[places[done]] = error.cause if isinstance(error.cause, Exception) else error
        except ray.exceptions.RayError as error:
            kind = type(error).__name__
            errors[places[done]] = InputError(
                f"The worker of a run was lost {RETRIES + 1} times ({kind}): see Ray's log, and start the same command again."
            )
        say(f"ray: {len(jobs) - len(waiting)} of {len(jobs)} jobs finished")
    if errors:
        raise errors[min(errors)]
    return results


def _nodes(ray):
    return [node for node in ray.nodes() if node["Alive"]]
