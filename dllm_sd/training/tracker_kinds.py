"""The trackers that a run can write to, each opened through accelerate's class of it.

A tracker's package is imported when the tracker is opened. What it writes lies in the run folder, TensorBoard's files
in `tb/` and those of the others in `trackers/`, unless an environment variable of the tracker names another place or a
server.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate.tracking import (
    CometMLTracker,
    GeneralTracker,
    MLflowTracker,
    SwanLabTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)
from PIL.Image import Image

from dllm_sd.training.folder import TRACKED

PROJECT = "dllm-sd"
Scalars = Mapping[str, int | float]


@dataclass(frozen=True)
class TrackedRun:
    """Where a run appears in a tracker."""

    run: Path
    """The run folder."""
    project: str | None
    """`log.project`."""
    name: str
    """Name of the run."""
    id: str
    """What the tracker knows the run by; of a new run a proposal."""
    new: bool
    """Whether the tracker does not know the run yet."""
    update: int
    """Finished updates; -1 before the evaluation of the initial weights."""

    @property
    def folder(self) -> Path:
        """The folder of trackers, as a whole path."""
        return (self.run / TRACKED).resolve()

    def project_or(self, variable: str) -> str:
        """The project: that of the config, else of the tracker's environment variable, else `PROJECT`."""
        return self.project or os.environ.get(variable) or PROJECT


class Tracker(ABC):
    """One tracker, opened. Steps are updates, and never decrease."""

    package: ClassVar[str]
    """What is imported; the extra of this package has the same name as the tracker."""
    writes_beside_log: ClassVar[bool] = False
    """Whether it writes files as metrics.jsonl is written, so that an error of the disk is one of the run."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.tracker = run, self.open(run)

    @abstractmethod
    def open(self, run: TrackedRun) -> GeneralTracker:
        """Open the run, or go on with it."""

    @property
    def id(self) -> str:
        """What the tracker knows the run by."""
        return self.run.id

    def settings(self, values: Mapping[str, bool | int | float | str | None]) -> None:
        """Store the hyperparameters of a new run."""
        self.tracker.store_init_configuration(dict(values))

    def numbers(self, values: Scalars, meanings: Mapping[str, str], update: int) -> None:
        """Store the values of an update; ``meanings`` has a sentence about each."""
        self.tracker.log(dict(values), step=update)

    def picture(self, name: str, image: Image, update: int) -> None:
        """Show a picture."""
        log_images: Any = getattr(self.tracker, "log_images", None)
        if log_images is not None:
            log_images({name: [image]}, step=update)

    def text(self, name: str, text: str, update: int) -> None:
        """Show a text, if the tracker shows texts by update."""
        return

    @property
    def native(self) -> Any:
        """The object of the tracker's own library, such as its run or its writer."""
        opened: Any = self.tracker
        return opened.tracker

    def close(self) -> None:
        """Write what is left, and close the tracker."""
        self.tracker.finish()


class TensorBoard(Tracker):
    """Event files in `tb/NAME`. A resumed run hides what was written after its checkpoint."""

    package = "tensorboard"
    writes_beside_log = True
    HEADLINES = ("eval/accuracy", "train/loss", "test/before/accuracy", "test/after/accuracy", "test/best/accuracy")
    """The metrics beside the hyperparameters."""

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Open a new event file in the folder that the run has in `tb/` already, else in one of its name."""
        folder = run.run / "tb"
        former = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        tracker = TensorBoardTracker(former[0] if former else run.name, folder, purge_step=run.update + 1)
        tracker.start()
        self.explained: set[str] = set()
        return tracker

    def settings(self, values: Mapping[str, bool | int | float | str | None]) -> None:
        """Store hyperparameters and the names of `HEADLINES` in the event file; accelerate's class makes folders."""
        from torch.utils.tensorboard.summary import hparams

        given = {name: value for name, value in values.items() if value is not None}
        for summary in hparams(given, dict.fromkeys(self.HEADLINES, 0.0)):
            self.native.file_writer.add_summary(summary)
        self.native.flush()

    def numbers(self, values: Scalars, meanings: Mapping[str, str], update: int) -> None:
        """Store the values, the first of each name with its sentence."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            summary = scalar(name, value)
            if name not in self.explained:
                summary.value[0].metadata.summary_description = meanings.get(name, "")
                summary.value[0].metadata.plugin_data.plugin_name = "scalars"
                self.explained.add(name)
            self.native.file_writer.add_summary(summary, update)
        self.native.flush()

    def picture(self, name: str, image: Image, update: int) -> None:
        """Show a picture."""
        import numpy as np

        self.native.add_image(name, np.asarray(image), update, dataformats="HWC")

    def text(self, name: str, text: str, update: int) -> None:
        """Show a text, which may be Markdown."""
        self.native.add_text(name, text, update)


class WandB(Tracker):
    """Weights & Biases; ``WANDB_MODE=offline`` needs no network, and `wandb sync` sends its folder later."""

    package = "wandb"

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Go on with the run of the id, or begin it; without links, since the run folder holds none."""
        settings = {"symlink": False, "console": "off"}
        where = {"dir": str(run.folder), "id": run.id, "name": run.name, "resume": "allow"}
        tracker = WandBTracker(run.project_or("WANDB_PROJECT"), settings=settings, **where)
        tracker.start()
        return tracker

    def text(self, name: str, text: str, update: int) -> None:
        """Show a text as a table of one cell."""
        self.tracker.log_table(name, columns=["text"], data=[[text]], step=update)  # pyright: ignore[reportAttributeAccessIssue]


class Trackio(Tracker):
    """trackio, in a local folder unless ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` is set.

    trackio reads its folder once, so all runs of a process share that of the first.
    """

    package = "trackio"

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Go on with the run of the name, or begin one."""
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))
        options = {"name": run.name if run.new else run.id, "resume": "never" if run.new else "allow"}
        tracker = TrackioTracker(run.project_or("TRACKIO_PROJECT"), embed=False, **options)
        tracker.start()
        return tracker

    @property
    def id(self) -> str:
        """The name of the run, by which trackio finds it again."""
        return self.native.name

    def picture(self, name: str, image: Image, update: int) -> None:
        """Show a picture; accelerate's class takes none."""
        import trackio  # pyright: ignore[reportMissingImports]

        self.tracker.log({name: trackio.Image(image)}, step=update)


class MLflow(Tracker):
    """MLflow, in a folder of files unless ``MLFLOW_TRACKING_URI`` names a server or another store."""

    package = "mlflow"

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Go on with the run of the id, or begin one."""
        import mlflow  # pyright: ignore[reportMissingImports]

        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(store or (run.folder / "mlflow").as_uri())
        known = None if run.new else run.id
        tracker = MLflowTracker(run.project_or("MLFLOW_EXPERIMENT_NAME"), run_id=known, run_name=run.name)
        tracker.start()
        return tracker

    @property
    def id(self) -> str:
        """The id that MLflow gave the run."""
        return self.native.info.run_id

    def picture(self, name: str, image: Image, update: int) -> None:
        """Show a picture; accelerate's class takes none."""
        import mlflow  # pyright: ignore[reportMissingImports]

        mlflow.log_image(image, key=name, step=update)


class Comet(Tracker):
    """Comet; ``COMET_START_ONLINE=0`` writes archives that `comet upload` sends later."""

    package = "comet_ml"

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Go on with the experiment of the key, or begin it."""
        from comet_ml import ExperimentConfig  # pyright: ignore[reportMissingImports]

        automatic = dict.fromkeys(("log_code", "log_git_patch", "parse_args", "auto_metric_logging"), False)
        folder = str(run.folder / "comet_ml")
        config = ExperimentConfig(
            **automatic, auto_output_logging="", display_summary_level=0, offline_directory=folder, name=run.name
        )
        where = {"experiment_key": run.id, "experiment_config": config}
        tracker = CometMLTracker(run.project_or("COMET_PROJECT_NAME"), **where)
        tracker.start()
        return tracker

    def picture(self, name: str, image: Image, update: int) -> None:
        """Show a picture; accelerate's class takes none."""
        self.native.log_image(image, name=name, step=update)

    def text(self, name: str, text: str, update: int) -> None:
        """Show a text."""
        self.native.log_text(text, step=update, metadata={"name": name})


class SwanLab(Tracker):
    """SwanLab; ``SWANLAB_MODE=offline`` needs no network, and `swanlab sync` sends its folder later."""

    package = "swanlab"

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Go on with the run of the id, or begin it."""
        where = {"log_dir": str(run.folder / "swanlab"), "id": run.id, "name": run.name, "resume": "allow"}
        tracker = SwanLabTracker(run.project_or("SWANLAB_PROJ_NAME"), **where)
        tracker.start()
        return tracker


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
    "comet_ml": Comet,
    "swanlab": SwanLab,
}
"""The trackers by their name in `log.trackers`."""
