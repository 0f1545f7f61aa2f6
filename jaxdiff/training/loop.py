"""The loop: it takes any task through its steps, saves, logs, draws, and stops politely. It knows no task by name."""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8

from jaxdiff.config import Config, TrainingConfig
from jaxdiff.progress import progress_bar
from jaxdiff.training.checkpoints import Checkpoints, abstract_state
from jaxdiff.training.log import MetricsLog, read_metrics, save_curve
from jaxdiff.training.maintenance import maintenance_is_sigterm
from jaxdiff.training.optimizer import learning_rate_schedule, make_optimizer
from jaxdiff.training.processes import is_first, noticing_a_loss
from jaxdiff.training.sharding import Runner, make_runner, state_shardings
from jaxdiff.training.stages import Programs, Stage, stage_at
from jaxdiff.training.state import Params, create_state
from jaxdiff.training.step import Loss, Update, make_update
from jaxdiff.training.watching import Trace, Watch, flops_of

Pictures = Callable[[Any], dict[str, UInt8[np.ndarray, "... h w c"]]]


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Trainable:
    """All that the loop knows of a task.

    The state is any pytree dataclass with a `step`; `make_update(axis_name)` gives update(state, batch, key) -> (state, metrics)
    whose metrics hold `loss` and `finite`; `pictures(state)` gives named uint8 images to look at, or [n h w c] to look at one
    after the other; `scores(state)`, every `score_every` steps and at the end, named numbers. `frozen`: arrays that no step
    changes, update's fourth argument where there are some; no checkpoint holds them. `publish(state, workdir)` is called when the
    run has come to its end and is saved. `stages`: where not all steps are taken by one program, in order, the first from step 0;
    then it is `make_update(axis_name, number)`, and batches have the stages' sizes. The state's shapes are those of all stages.
    `plain(number)`: the update of a stage on one device with nothing recomputed or accumulated, whose operations are counted.
    `begin(shardings)` makes the first state where it will live if `init`, of the same shapes, is not what a run begins with.
    """

    init: Callable[[Key[Array, ""]], Any]
    make_update: Callable[..., Callable[..., Any]]
    pictures: Pictures
    curves: tuple[str, ...]
    scores: Callable[[Any], dict[str, float]] | None = None
    score_every: int = 0
    frozen: Any = None
    publish: Callable[[Any, pathlib.Path], None] | None = None
    stages: tuple[Stage, ...] = ()
    begin: Callable[[Any], Any] | None = None
    plain: Callable[..., Callable[..., Any]] | None = None


def minimise(
    loss: Loss,
    init: Callable[[Key[Array, ""]], Params],
    config: Config,
    pictures: Pictures,
    curves: tuple[str, ...],
    frozen: Any = None,
    given: Callable[[Any], Params] | None = None,
) -> Trainable:
    """The task of minimising one loss over all parameters, with the config's optimiser.

    `frozen`: see `Trainable`; the loss's fourth argument where there is some. `given(shardings)`: the parameters to begin with,
    where those are not `init`'s.
    """
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    rate = learning_rate_schedule(config.optimizer, config.training.num_steps)

    def update(axis_name: str | None) -> Update:
        return make_update(loss, optimizer, config.optimizer, rate, config.training.accumulation_steps, axis_name)

    def begin(shardings: Any) -> Any:
        assert given is not None
        make = jax.jit(lambda params: create_state(params, optimizer), out_shardings=shardings, donate_argnums=0)
        return make(given(shardings.params))

    return Trainable(
        lambda key: create_state(init(key), optimizer),
        update,
        pictures,
        curves,
        frozen=frozen,
        begin=None if given is None else begin,
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the step reached, the state, and the signal that stopped it (None: it ran to its end)."""

    step: int
    state: Any
    stopped_by: signal.Signals | None


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Give stop(step), to be asked after every step: the signal (SIGINT, SIGTERM) for which to stop there, else None.

    A second signal acts as usual. Where a run has several processes, one of them may get it alone: JAX's preemption service,
    which listens to SIGTERM itself, tells the others and finds the next step that all of them will come to.
    """
    received: list[signal.Signals] = []
    several = jax.process_count() > 1
    kinds = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    old = {s: signal.getsignal(s) or signal.SIG_DFL for s in kinds}

    def note(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, old[signal.Signals(number)])
        print(f"\n{received[-1].name}: stopping after this step", file=sys.stderr)
        if several:
            signal.raise_signal(signal.SIGTERM)

    def stop(step: int) -> signal.Signals | None:
        if several and not multihost_utils.reached_preemption_sync_point(step):
            return None
        return received[0] if received else signal.SIGTERM if several else None

    try:
        for s in old:
            signal.signal(s, note)
    except ValueError:  # not in the main thread (a notebook's worker): signals are someone else's business
        old = {}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def train(
    task: Trainable,
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]],
    config: TrainingConfig,
    mesh: Mesh,
    mode: str,
    seed: int,
    workdir: pathlib.Path,
    profile: bool = False,
) -> Outcome:
    """Train until `config.num_steps` or a signal, going on from the newest checkpoint in `workdir`.

    `batches(start)` generates this process's share of batches start, start + 1, ... `profile`: write a trace of a few steps.
    Raises NonFiniteLossError.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    shapes = jax.eval_shape(task.init, init_key)
    stages = task.stages or (Stage("", 0, config.batch_size),)

    def runner_of(stage: int) -> Runner:
        update = functools.partial(task.make_update, number=stage) if task.stages else task.make_update
        return make_runner(update, shapes, mesh, mode, task.frozen)

    shardings = state_shardings(shapes, mesh, mode)
    target = abstract_state(shapes, shardings)
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    restored = checkpoints.restore_latest(target)
    if restored is None:
        start = 0
        if is_first() and read_metrics(workdir / "metrics.jsonl"):
            print(f"note: {workdir} holds no checkpoint: the run begins again from step 0", file=sys.stderr)
        state = task.begin(shardings) if task.begin else init_sharded(task.init, init_key, shardings)
    else:
        start, state = restored
        print(f"going on from step {start}", flush=True)
    log = MetricsLog(workdir, start)
    run = _Run(task, config, log, checkpoints, start, Watch(list(mesh.devices.flat)))
    trace = Trace(workdir / "profile", start, config.num_steps) if profile else None
    programs = Programs(stages, runner_of, batches, target, run_key)
    stopped = None
    try:
        with (
            noticing_a_loss(),
            stop_signals() as stop,
            maintenance_is_sigterm(),
            contextlib.closing(batches(start)) as source,
        ):
            for step in range(start, config.num_steps):
                number = stage_at(stages, step)
                entered = run.enter(stages[number])
                try:
                    with run.watch.waiting():
                        batch = next(source)
                    runner = programs.at(step)
                except Exception:  # unreadable data, say: what was learnt so far is not lost
                    if jax.process_count() == 1:  # saving takes all processes, and the others may have read theirs
                        run.save(state)
                    raise
                if entered:
                    run.count_operations(number, shapes, batch, run_key)
                with trace.around(step) if trace else contextlib.nullcontext():
                    state, metrics = runner.step(state, runner.put_batch(batch), run_key, *runner.frozen)
                if trace and step == trace.last:
                    jax.block_until_ready(metrics)
                    with run.watch.paused():
                        trace.close()
                run.after_step(step + 1, state, metrics)
                if stopped := stop(step + 1):
                    break
            run.save(state)
            checkpoints.wait()  # before another signal would act as usual
        with noticing_a_loss():
            run.finish(state)
    finally:
        with contextlib.ExitStack() as closing:  # from the last to the first, whichever of them fails
            for close in (programs.close, checkpoints.close, log.close, run.bar.close):
                closing.callback(close)
            if trace:
                closing.callback(trace.close)
    return Outcome(run.step, state, stopped)


def init_sharded(init: Callable[[Any], Any], key: Any, shardings: Any) -> Any:
    """Make the initial state where it will live. Optimising this once-run program would cost more than it saves."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    return jax.jit(init, out_shardings=shardings).lower(key).compile(options)(key)


class _Run:
    """The bookkeeping around the steps of one run."""

    def __init__(
        self,
        task: Trainable,
        config: TrainingConfig,
        log: MetricsLog,
        checkpoints: Checkpoints,
        start: int,
        watch: Watch,
    ):
        self.task, self.config, self.log, self.checkpoints, self.watch = task, config, log, checkpoints, watch
        self.step = self.saved = self.start = start
        self.scored: set[str] = set()  # names of scores
        self.bar = progress_bar(start, config.num_steps, "training")
        self._pending: list[Any] = []  # metrics still on the device: reading them at every step would stall it
        self.stage: Stage | None = None
        self._compiling = False

    def enter(self, stage: Stage) -> bool:
        """Whether the next step is a stage's first; says so. Numbers of different stages are not mixed."""
        if stage is self.stage:
            return False
        self.flush(self.step)
        self.stage, self._compiling = stage, True
        self.watch.restart()
        self.bar.set_postfix_str(f"compiling the first step{f' of {stage.name}' if stage.name else ''}")
        return True

    def count_operations(self, number: int, state: Any, batch: dict[str, np.ndarray], key: Any) -> None:
        """Of a step of stage `number`, where it is known how many the devices could do; `batch`: this process's share of one."""
        if self.task.plain is None or not self.watch.knows_peak:
            return
        assert self.stage is not None
        size = self.stage.batch_size
        shapes = {name: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype) for name, value in batch.items()}
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.task.frozen)
        extra = () if frozen is None else (frozen,)
        self.watch.flops = flops_of(self.task.plain(number), state, shapes, key, *extra)

    def after_step(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        """Log, draw and save whatever is due after `step` updates."""
        config, self.step = self.config, step
        self._pending.append(metrics)
        self.bar.update()
        if self._compiling:
            jax.block_until_ready(metrics)
            self.bar.set_postfix_str(f"first step after {self.watch.seconds:.1f} s")
            self.watch.restart()
            self._compiling = False
        else:
            self.watch.stepped()
        if step % config.log_every == 0:
            self.flush(step)
            self.checkpoints.check()
        if config.sample_every and step % config.sample_every == 0 and step < config.num_steps:
            self.draw(state)
        if step % config.checkpoint_every == 0:
            self.save(state)
        if self.task.scores and step % self.task.score_every == 0 and step < config.num_steps:
            self.score(state)

    def flush(self, step: int) -> None:
        """Read the pending metrics, refuse non-finite ones, and log their mean."""
        if not self._pending:
            return
        history: list[dict[str, Any]] = jax.device_get(self._pending)
        self._pending = []
        for offset, metrics in enumerate(history, start=step - len(history) + 1):
            if not metrics["finite"]:
                others = [
                    name for name in metrics if name not in ("loss", "grad_norm") and not np.isfinite(metrics[name])
                ]
                raise NonFiniteLossError(
                    f"step {offset}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}"
                    f"{''.join(f', {name} {metrics[name]}' for name in others)}; the last good checkpoint is that of step "
                    f"{self.saved} (try a smaller learning rate, or float32)"
                )
        assert self.stage is not None
        columns = {name: np.array([m[name] for m in history], np.float64) for name in history[0] if name != "finite"}
        # A task may forgive a step that is not finite (`finite` was true): then the others say how it goes.
        finite = {name: column[np.isfinite(column)] for name, column in columns.items()}
        values = {name: float(column.mean()) for name, column in finite.items() if len(column)}
        values |= self.watch.report(self.stage.batch_size)
        self.log.scalars(step, values)
        where = f"{self.stage.name}, " if self.stage.name else ""
        pace = f", {values['images_per_second']:.0f} images/s" if "images_per_second" in values else ""
        self.bar.set_postfix_str(f"{where}loss {values.get('loss', np.nan):.4f}{pace}")

    def draw(self, state: Any) -> None:
        """Make the task's pictures; the time they take is not counted as training time."""
        self.flush(self.step)
        with self.watch.paused():
            for name, image in self.task.pictures(state).items():
                self.log.picture(self.step, name, image)

    def score(self, state: Any) -> None:
        """Log the task's scores; the time they take is not counted as training time."""
        assert self.task.scores is not None
        self.flush(self.step)
        with self.watch.paused():
            self._score(state)

    def _score(self, state: Any) -> None:
        assert self.task.scores is not None
        scores = self.task.scores(state)
        if not scores:  # there may be nothing to say yet
            return
        self.log.scalars(self.step, scores)
        self.scored |= set(scores)
        self.bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def save(self, state: Any) -> None:
        """Save a checkpoint, once the loss of every step up to it is known to be finite."""
        self.flush(self.step)
        if self.saved != self.step:
            self.checkpoints.save(self.step, state)
            self.saved = self.step

    def finish(self, state: Any) -> None:
        """Save what was reached; publish it and draw the last pictures where the run came to its end."""
        self.save(state)
        if self.task.publish and self.step >= self.config.num_steps:
            self.bar.set_postfix_str("publishing")
            self.task.publish(state, self.log.workdir)
        if self.step >= self.config.num_steps and not self.log.has_picture(self.step):
            self.bar.set_postfix_str("drawing the last samples")
            self.draw(state)
        if self.task.scores and self.step >= self.config.num_steps and self.step > self.start:
            self.score(state)
        save_curve(self.log.workdir, [*self.task.curves, *sorted(self.scored)])
