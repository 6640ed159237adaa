"""How a run presents itself: to experiment trackers, and on the card next to its weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.registry import Component, NameOf
from pretrain.core.section import Section


class TrackerKind(Component):
    """A service for experiments.

    A recipe only names it: servers and keys come from the environment.

    Attributes:
        module: that is imported for it.
        packages: that pip installs for it.
    """

    module: ClassVar[str]
    packages: ClassVar[str]


class Wandb(TrackerKind):
    """Weights & Biases."""

    implementation: ClassVar[str] = "pretrain.callbacks.trackers.wandb:WandbTracker"
    module: ClassVar[str] = "wandb"
    packages: ClassVar[str] = "wandb"
    kind: Literal["wandb"]


class MLflow(TrackerKind):
    """MLflow, on a server or in a file of the run's folder."""

    implementation: ClassVar[str] = "pretrain.callbacks.trackers.mlflow:MLflowTracker"
    module: ClassVar[str] = "mlflow"
    packages: ClassVar[str] = "mlflow-skinny sqlalchemy alembic"
    kind: Literal["mlflow"]


class Comet(TrackerKind):
    """Comet, online or into a file that is uploaded later."""

    implementation: ClassVar[str] = "pretrain.callbacks.trackers.comet:CometTracker"
    module: ClassVar[str] = "comet_ml"
    packages: ClassVar[str] = "comet_ml"
    kind: Literal["comet"]


class TrackersConfig(Section):
    """Trackers that get every record, the resolved recipe, the summary and the curves.

    TensorBoard is not among them: see ``logging.tensorboard``.

    Credentials and servers come from the environment only, by the variables of each tracker:
    WANDB_API_KEY, WANDB_MODE, COMET_API_KEY, COMET_START_ONLINE, MLFLOW_TRACKING_URI ... Without a
    MLFLOW_TRACKING_URI, MLflow writes to mlflow.db in the run's folder.
    """

    # Names, checked against the registry: also those of plugins.
    kinds: Annotated[list[Annotated[str, NameOf(TrackerKind)]], Field(min_length=1)]
    project: str | None = Field(
        None,
        description="W&B's and Comet's project, MLflow's experiment; the recipe's name by default",
    )
    name: str | None = Field(None, description="of the run; the name of its folder by default")
    group: str | None = Field(None, description="W&B's group; a tag of this name elsewhere")
    tags: list[str] = []


class CardConfig(Section):
    """What the model card says in addition to the rest of the recipe.

    A card is the README.md of a run, of its checkpoints and of its exports.
    """

    license: str | None = Field(
        None, description="of the weights, as an SPDX identifier such as apache-2.0"
    )
    base_model: str | None = Field(
        None,
        description=(
            "the hub's name of the model that it started from, such as allenai/OLMoE-1B-7B-0924"
        ),
    )
    intended_use: str | None = Field(None, description="research on pretraining, by default")
    limits: str | None = Field(None, description="those of any base model, by default")
    ethics: str | None = Field(
        None, description="risks and who may be harmed; those of any base model, by default"
    )
    contact: str | None = Field(None, description="whom to ask and to report problems to")
    watts_per_device: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        None,
        description=(
            "power of one rank's device, for an estimate if no counter of energy can be read; 350 "
            "for an accelerator and 10 for each core of a processor by default"
        ),
    )
    power_usage_effectiveness: Annotated[float, Field(ge=1, le=10)] = Field(
        1.0, description="energy of the data centre per energy of its computers (PUE)"
    )
    grid_kg_per_kwh: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None,
        description=(
            "kg of CO2 equivalent per kWh of the electricity used; without it the card says "
            "nothing of carbon"
        ),
    )
    data_origin: dict[str, str] = Field(
        {},
        description=("origin and licence of each source of the data, by the source's name"),
    )
