"""One run on several devices: of one machine (MirroredStrategy) or of several machines (MultiWorkerMirroredStrategy).

Every replica sees an equal share of each batch. The loss is the mean over the whole batch, and the penalty counts once:
the gradient sum over r of d/dw (1/R mean_r(loss) + 1/R penalty) equals that of mean(loss) + penalty on one device.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib

import keras
import tensorflow as tf

from l2sp_tf.files.errors import InputError
from l2sp_tf.models.copies import copy_of, copy_variables
from l2sp_tf.penalties.weights import keyed_weights, set_regularizer

KINDS = ("none", "mirrored", "multiworker")
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)


@functools.cache  # a process can have only one multi-worker strategy, and several mirrored ones may hang
def make_strategy(kind):
    """Returns the strategy of a kind over all devices, the same object on every call in a process.

    Args:
        kind: "none"; "mirrored" for all GPUs of this machine, or without GPUs for its CPU devices; or "multiworker"
            for all machines in the environment variable TF_CONFIG, called before TensorFlow computes anything.

    Returns:
        A `tf.distribute.Strategy`, or None for "none".

    Raises:
        InputError: the kind is unknown, there is only one device, TF_CONFIG is missing or wrong, or the call comes too late.
    """
    if kind not in KINDS:
        raise InputError(f"distribute is {kind!r}: give one of {', '.join(KINDS)}.")
    if kind == "none":
        return None
    return _mirrored() if kind == "mirrored" else _multiworker()


def _mirrored():
    gpus, cpus = (tf.config.list_logical_devices(name) for name in ("GPU", "CPU"))
    devices = [device.name for device in gpus or cpus]
    if len(devices) < 2:
        raise InputError("distribute is mirrored, but this machine has one device only: leave --distribute out.")
    reduction = None if gpus else tf.distribute.ReductionToOneDevice()  # collectives hang on virtual CPU devices
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def _multiworker():
    try:
        config = json.loads(os.environ.get("TF_CONFIG", "{}"))
        tasks = [(kind, number) for kind in ("chief", "worker") for number, _ in enumerate(config["cluster"].get(kind, []))]
        found = (config["task"]["type"], int(config["task"]["index"])) in tasks
    except (ValueError, KeyError, TypeError, AttributeError):
        found, tasks = False, []
    if not found or len(tasks) < 2 or set(config["cluster"]) - {"chief", "worker"}:
        raise InputError(
            "distribute is multiworker, but TF_CONFIG does not name two workers or more and which of them this is: set it to "
            '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}} and so on.'
        )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise InputError(f"The strategy multiworker has to be made before TensorFlow computes anything: {error}") from error


class Devices:
    """The devices of one training, and this process's part of them.

    Args:
        strategy: a strategy from `make_strategy`; None for one device.
    """

    def __init__(self, strategy=None):
        self.strategy = strategy

    @classmethod
    def of(cls, kind):
        """Returns the devices of a kind, as in `make_strategy`."""
        return cls(make_strategy(kind))

    def scope(self):
        """Returns the context in which to create an optimizer and metrics for these devices; for one device it does nothing."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    @property
    def replicas(self):
        """The number of copies of the model that train side by side."""
        return 1 if self.strategy is None else self.strategy.num_replicas_in_sync

    @property
    def part(self):
        """This worker's place among all workers: (index, count), which is (0, 1) unless there are several machines."""
        if self.is_one_process:
            return 0, 1
        resolver = self.strategy.cluster_resolver
        spec = resolver.cluster_spec()
        tasks = [(kind, i) for kind in ("chief", "worker") if kind in spec.jobs for i in spec.task_indices(kind)]
        return tasks.index((resolver.task_type, resolver.task_id)), len(tasks)

    @property
    def is_chief(self):
        """Whether this process writes the results."""
        return self.part[0] == 0

    @property
    def is_one_process(self):
        """Whether this process trains alone, on any number of devices."""
        return not isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy)

    def chief_says(self, question):
        """Returns the chief's answer to a yes-or-no question in every worker. Only the chief asks; workers wait for each other.

        Args:
            question: a function without arguments.

        Raises:
            ConnectionError: a worker was lost.
        """
        if self.is_one_process:
            return bool(question())
        return _sum(self.strategy, int(bool(question())) if self.is_chief else 0) > 0

    def wait_for_chief(self):
        """Waits until the chief gets here too and has written its files."""
        self.chief_says(lambda: True)

    def check_shared(self, folder):
        """Creates a folder, and raises an InputError unless all workers see the chief's files in it."""
        if self.is_one_process:
            return
        path = pathlib.Path(folder) / ".seen-by-all-workers"
        if self.is_chief:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self.wait_for_chief()
        unseen = _sum(self.strategy, int(not path.exists()))
        if self.is_chief:
            path.unlink()
        if unseen:
            raise InputError(f"workdir is {folder}, which not all workers see: give a folder on a disk that the machines share.")

    def check_same_run(self, *identity):
        """Checks that all workers are about to compute the same run.

        Raises:
            InputError: the `repr` of the values `identity` differs between workers.
            ConnectionError: a worker was lost.
        """
        if not self.is_one_process:
            own = int(hashlib.sha256(repr(identity).encode()).hexdigest()[:8], 16)
            if _sum(self.strategy, own) != own * self.replicas:
                raise InputError("The workers are about to compute different runs: give all the same flags, data and --workdir.")

    def check_batch_size(self, batch_size):
        """Raises an InputError unless all replicas can get equal shares of a batch."""
        if batch_size % self.replicas:
            raise InputError(f"batch_size is {batch_size}, which {self.replicas} replicas cannot share equally: give a multiple.")

    def check_optimizer(self, optimizer, jit_compile=False):
        """Refuses settings of optimizers, inner ones included, that Keras gets wrong on several replicas (tried on Keras 3.15).

        Args:
            optimizer: a Keras optimizer.
            jit_compile: whether XLA is to compile its step.

        Raises:
            InputError: the optimizer has such a setting.
        """
        clips = "clips each replica's share of the gradient instead of the whole"
        found = {"jit_compile": "fails"} if jit_compile else {}
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            found["LossScaleOptimizer (mixed_float16)"] = "takes an overflow for finite unless it is the first replica's"
        while optimizer is not None:
            wrong = dict.fromkeys(("clipnorm", "global_clipnorm", "clipvalue"), clips)
            wrong["gradient_accumulation_steps"] = "fails"
            if optimizer.use_ema:
                wrong["ema_overwrite_frequency"] = "fails"
            found |= {name: what for name, what in wrong.items() if getattr(optimizer, name)}
            optimizer = getattr(optimizer, "inner_optimizer", None)
        self._refuse(found)

    def check_compiled(self, model):
        """Refuses settings of a compiled model that Keras gets wrong on several replicas (each tried on Keras 3.15).

        Raises:
            InputError: the model or its optimizer has such a setting.
        """
        if any(variable.name == "seed_generator_state" for variable in model.variables):
            self._refuse({"a random layer, such as Dropout,": "draws the same numbers on every replica"})
        self.check_optimizer(model.optimizer, model.jit_compile)

    def _refuse(self, found):
        if found and self.replicas > 1:
            name, what = next(iter(found.items()))
            raise InputError(f"On several replicas {name} {what} in Keras: leave it out, or train without --distribute.")

    def replicated(self, model):
        """Copies a functional or Sequential model with weights and penalties to all replicas; returns it unchanged on one device.

        Batch norm takes its statistics over all replicas, so that it computes the same as on one device.

        Raises:
            InputError: the model cannot be copied.
        """
        if self.strategy is None:
            return model
        if not isinstance(model, keras.Sequential) and getattr(model, "inputs", None) is None:
            kind = type(model).__name__
            raise InputError(f"A model of class {kind} cannot be copied to several replicas: give a functional one.")
        copy = copy_of(model, scope=self.scope(), seeds=True)
        for one, two in zip(keyed_weights(model).values(), keyed_weights(copy).values(), strict=True):
            set_regularizer(two, one.variable.regularizer)
        for layer in copy._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
        return copy


def copy_weights(source, target):
    """Assigns all variables of `source` to `target`, a model of the same architecture, unless they are the same model."""
    if source is not target:
        copy_variables(source, target)


def fit(model, batches, *, steps, callbacks=(), verbose=0):
    """Trains a compiled model for one epoch of `steps` batches, under the strategy in which it was created.

    On one machine this is Keras' `fit`. On several, where that fails (Keras 3.15), it is our own loop over
    `model.train_step`, which calls the same callbacks in every worker. There `on_train_batch_end` gets the metrics after
    each step, averaged over the replicas.

    Args:
        model: a compiled model, from `replicated` or without a strategy.
        batches: a tf.data.Dataset of whole batches; on several machines, of this worker's part of each, as
            `training_batches` returns it.
        steps: number of batches.
        callbacks, verbose: as in Keras' `fit`.

    Raises:
        InputError: the model has a setting that Keras gets wrong on several replicas.
        ConnectionError: a worker was lost.
    """
    devices = Devices(model.distribute_strategy)
    devices.check_compiled(model)
    if devices.is_one_process:
        model.fit(batches, epochs=1, steps_per_epoch=steps, callbacks=list(callbacks), shuffle=False, verbose=verbose)
        return
    options = {"add_progbar": verbose != 0 and devices.is_chief, "verbose": verbose, "epochs": 1, "steps": steps}
    _fit_on_workers(model, devices, batches, callbacks, options)


def _fit_on_workers(model, devices, batches, callbacks, options):
    strategy = devices.strategy
    callbacks = keras.callbacks.CallbackList(list(callbacks), model=model, **options)
    train_step, step, logs = _step_of(model, strategy), 0, {}
    model.stop_training = False
    try:
        iterator = iter(_shares(devices, batches))
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        for step in range(options["steps"]):
            callbacks.on_train_batch_begin(step)
            logs = {name: float(value) for name, value in train_step(iterator).items()}
            callbacks.on_train_batch_end(step, logs)
            if _total(strategy, model.stop_training):  # if one worker stopped alone, the others would wait forever
                model.stop_training = True
                break
    except LOST as error:
        raise _lost(f"in step {step + 1}") from error
    model.optimizer.finalize_variable_values(model.trainable_weights)
    callbacks.on_epoch_end(0, logs)
    callbacks.on_train_end(logs)


def _step_of(model, strategy):
    """Returns a traced function that takes the next batch from an iterator and returns the metrics so far."""

    @tf.autograph.experimental.do_not_convert
    def step(iterator):
        results = strategy.run(model.train_step, args=(next(iterator),))
        return {name: strategy.reduce("MEAN", value, axis=None) for name, value in results.items()}

    return tf.function(step)


def _shares(devices, batches):
    """Distributes this worker's part of each batch over its replicas, in order."""
    local = devices.replicas // devices.part[1]

    def shares(context):
        size = tf.nest.flatten(batches.element_spec)[0].shape[0]
        return batches if local == 1 else batches.rebatch(size // local)

    return devices.strategy.distribute_datasets_from_function(shares)


def _sum(strategy, number):
    """Returns the sum of a number over all replicas."""
    try:
        return _total(strategy, number)
    except LOST as error:
        raise _lost("while the workers waited for each other") from error


def _total(strategy, number):
    return int(_summing(strategy)(tf.constant(int(number), tf.int64)))


@functools.cache  # so that it is traced once
def _summing(strategy):
    @tf.autograph.experimental.do_not_convert
    def total(value):
        return strategy.reduce("SUM", strategy.run(tf.identity, args=(value,)), axis=None)

    return tf.function(total)


def _lost(when):
    return ConnectionError(f"A worker of this run was lost {when}: start the same command on all machines again.")
