"""Everything that can be refused before a rank is started is refused here, in well under a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.dataset import Dataset
from data_pipeline.stream import Stream
from solomonov.architectures import require_objective
from solomonov.branch import check_branch
from solomonov.config import Config, Loaded
from solomonov.errors import ConfigurationError
from solomonov.host import visible_gpus
from solomonov.layouts import legal_batch
from solomonov.model.counts import parameter_count
from solomonov.plan import BatchPlan
from solomonov.runfolder import RunFolder, open_run, run_folder, unwritable
from solomonov.schedule import ScheduleConfig


@dataclass(frozen=True)
class PreparedRun:
    """A run that may start: its plan is legal and its data is there."""

    run: RunFolder
    plan: BatchPlan
    loaded: Loaded
    launch: Mapping[str, Any]
    data: Mapping[str, Any]
    derived: Mapping[str, Any]

    def make_folder(self) -> None:
        """Make the run's folder, which the run's lock needs.

        Raises:
            ConfigurationError: it cannot be made.
        """
        try:
            self.run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.run.path, error) from error

    def write(self) -> None:
        """Write config.yaml and resolved.json; call it with the run's lock held."""
        open_run(self.loaded, launch=self.launch, data=self.data, derived=self.derived)


def prepare_run(
    loaded: Loaded,
    *,
    ranks_per_node: int,
    launch: Mapping[str, Any],
    nodes: int = 1,
    gpus_per_node: int | None = None,
) -> PreparedRun:
    """Check layout, batch and data of a run; nothing is written.

    Args:
        ranks_per_node: number of ranks that will be started on each machine.
        launch: the validated launch section, for the record.
        nodes: number of machines.
        gpus_per_node: of the machines that will run it; None: they are as this one.

    Raises:
        ConfigurationError: anything that retrying will not help.
        DataError: the prepared data is missing or damaged.
    """
    config = loaded.config
    require_objective(config.model)
    ranks, precision = nodes * ranks_per_node, config.training.precision
    gpus = visible_gpus() if gpus_per_node is None else gpus_per_node
    if precision == "auto" and gpus:
        precision = "bf16"  # every CUDA device of the last five generations has it; the rank itself decides
    plan = legal_batch(config, precision=precision, world=ranks)
    _check_schedule(config.schedule, plan.total_steps)
    _check_warmups(config.schedule, plan)
    if gpus and ranks_per_node > gpus:
        raise ConfigurationError(
            "there are more ranks than GPUs",
            got=f"{ranks_per_node} ranks on each machine (launch.ranks_per_node), {gpus} GPUs that they may use",
            rule="each rank has a GPU of its own",
            remedy=f"set launch.ranks_per_node to {gpus} or null",
        )
    folder = Path(config.data.folder).expanduser()
    if not (folder / "MANIFEST.json").exists():
        raise ConfigurationError(
            "the data is not prepared",
            got=f"{folder} holds no MANIFEST.json",
            rule="training reads the folder that `solomonov prepare` writes (data.folder)",
            remedy="run `solomonov prepare` with this configuration first",
        )
    with Dataset.open(folder) as dataset:
        manifest = dataset.manifest
        stream = make_stream(config, dataset).identity
    check_branch(config, plan, stream)
    trained, asked = manifest.tokenizer, config.tokenizer
    if (trained.kind, trained.vocab_size) != (asked.kind, asked.vocab_size):
        raise ConfigurationError(
            "the data was prepared with another tokenizer",
            got=f"{trained.kind}, {trained.vocab_size} ids in {folder}; {asked.kind}, {asked.vocab_size} asked for",
            rule="training uses the tokenizer of its data",
            remedy="prepare the data with this configuration in another data.folder, or restore the tokenizer section",
        )
    run = run_folder(config)
    parameters = parameter_count(config.model, manifest.vocab_size)
    return PreparedRun(
        run=run,
        plan=plan,
        loaded=loaded,
        launch=launch,
        data={"stream": stream, "tokenizer": manifest.tokenizer_digest},
        derived={
            "batch": plan.describe() if config.parallel else plan.describe_total(),
            "ranks": ranks,
            "parameters": parameters,
            "total_steps": plan.total_steps,
        },
    )


def make_stream(config: Config, dataset: Dataset) -> Stream:
    """The stream of training rows that a configuration describes."""
    return Stream(
        dataset,
        sequence_tokens=config.data.sequence_tokens,
        packing=config.data.packing,
        seed=config.run.seed,
        weights={source.name: source.weight for source in config.data.sources},
        cache_bytes=config.data.cache_bytes,
    )


def _check_schedule(schedule: ScheduleConfig, total_steps: int) -> None:
    warmup, decay = schedule.warmup_steps, schedule.decay_steps or 0
    if warmup >= total_steps:
        raise ConfigurationError(
            "the learning rate never reaches its peak",
            got=f"schedule.warmup_steps {warmup} in a run of {total_steps} updates",
            rule="the warm-up is shorter than the run",
            remedy=f"set schedule.warmup_steps to {total_steps // 10}, or train longer",
        )
    if warmup + decay > total_steps:
        raise ConfigurationError(
            "warm-up and decay are longer than the run",
            got=f"schedule.warmup_steps {warmup} and schedule.decay_steps {decay} in a run of {total_steps} updates",
            rule="the decay begins when the warm-up has ended",
            remedy=f"set schedule.decay_steps to at most {total_steps - warmup}, or train longer",
        )


def _check_warmups(schedule: ScheduleConfig, plan: BatchPlan) -> None:
    trained = plan.trained_tokens(plan.total_steps - 1)
    for name, warmup in (("batch_warmup", schedule.batch_warmup), ("sequence_warmup", schedule.sequence_warmup)):
        if warmup is not None and warmup.tokens > trained:
            raise ConfigurationError(
                "no update has its full size" if name == "batch_warmup" else "no update ever attends over whole rows",
                got=f"schedule.{name}.tokens {warmup.tokens}, {trained} tokens before the last update",
                rule="the warm-up has ended when the last update begins",
                remedy=f"set schedule.{name}.tokens to at most {trained}, or train longer",
            )


def finished_step(run: RunFolder, total_steps: int) -> int | None:
    """The last step, if the run has trained to its end and the checkpoint of that step is still there."""
    event = run.journal.last("training_finished", "resumed", "fresh_start_requested")
    if event is None or event["event"] != "training_finished" or event["step"] < total_steps:
        return None
    step = int(event["step"])
    return step if (run.checkpoints / f"step-{step:08d}" / "MANIFEST.json").exists() else None
